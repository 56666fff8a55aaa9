// The component: list of layers, picture, read-out, keys and pointer. `start` fills one element of the class bnheat.

let printing = false

const start = root => {
  const json = root.querySelector('script[type="application/json"]')
  if (!json) return
  root.dataset.ready = ''
  const d = JSON.parse(json.textContent),
    C = d.starts.length - 1,
    B = d.rows - 4,
    cache = new Map(),
    box = (into, name, attrs) => el('div', into, '', { class: 'bnheat-' + name, ...attrs })
  if (d.title) box(root, 'title').textContent = d.title
  const body = box(root, 'body'),
    side = box(body, 'side'),
    main = box(body, 'main'),
    list = box(side, 'list', { role: 'listbox', 'aria-label': 'layers' }),
    label = el('label', side)
  const same = el('input', label, '', { type: 'checkbox' }),
    name = el('b', main),
    which = el('span', main),
    plot = box(main, 'plot')
  const canvas = el('canvas', plot, '', { tabindex: 0, role: 'img' }),
    cross = [el('i', plot), el('i', plot)]
  el('small', main, d.note)
  const read = box(main, 'read', { role: 'status' }),
    lines = [el('div', read), el('b', read)]
  label.append('same colours for all layers')
  side.hidden = d.layers.length < 2

  // wanted: the layer that was clicked; chosen: the layer on the canvas, which follows as soon as its counts v are unpacked;
  // at: column and row under the crosshair
  let wanted = 0, chosen = 0, v = null, G = null, at = null

  const draw = () => {
    const w = plot.clientWidth,
      layer = d.layers[chosen],
      h = Math.round(clamp(w * .62, 330, 520))
    if (!w || !v) return
    const dpr = Math.max(devicePixelRatio || 1, printing ? 2 : 1),
      look = getComputedStyle(root),
      g = canvas.getContext('2d'),
      any = r => v.subarray(r * C, r * C + C).some(n => n)
    const top = same.checked ? Math.max(...d.layers.map(l => l.top)) : layer.top,
      max = squash(top) || 1
    Object.assign(canvas, { width: Math.round(w * dpr), height: Math.round(h * dpr) })
    G = geometry(d, layer, w, h, [any(0), any(B + 1)])
    if (layer.edges) paint(d, v, max, G, g, dpr)
    g.scale(dpr, dpr)
    decorate(d, layer, top, max, G, g, printing ? '#000' : look.color, look.fontFamily)
    canvas.dataset.plot = [G.x, G.y, G.W, G.H]
    tell()
  }

  // Move the crosshair, and write the two lines below the picture.
  const tell = () => {
    const e = d.layers[chosen].edges,
      on = at && e
    if (on) at = [clamp(at[0], 0, C - 1), clamp(at[1], +!G.strips[0], B + G.strips[1])]
    for (const i of cross) i.hidden = !on
    if (!on) return lines.forEach((l, i) =>
      l.textContent = i ? '' : 'Point at the picture to read a count, or focus it and use the arrow keys.')
    const [c, r] = at,
      n = d.starts[c + 1] - d.starts[c],
      get = k => v[k * C + c] / n,
      [px, py] = G.middle(c, r),
      y0 = G.strips[1] ? G.band[1] : G.y,
      y1 = G.strips[0] ? G.band[0] + 12 : G.y + G.H
    cross[0].style = `left: ${px}px; top: ${y0}px; width: 1px; height: ${y1 - y0}px`
    cross[1].style = `left: ${G.x}px; top: ${py}px; width: ${G.W}px; height: 1px`
    const p = power(e),
      edge = k => fixed(e[k] / 10 ** p, (e[B] - e[0]) / B / 10 ** p, 2),
      all = get(d.rows - 1),
      bad = get(d.rows - 2)
    const bin =
      (r == 0 ? 'below ' + edge(0) : r > B ? 'above ' + edge(B) : edge(r - 1) + ' to ' + edge(r)) + (p ? ' \u00d710' + sup(p) : '')
    const count =
      `${d.signed ? 'difference' : 'count'} ${d.signed && get(r) > 0 ? '+' : ''}${number(get(r))}` +
      (n > 1 ? ` (mean of ${n} minibatches)` : '')
    const share = all ? `, ${number(get(r) / all * 100, { maximumSignificantDigits: 3 })} % of ${number(all)}` : '',
      lost = bad ? `; ${number(bad)} NaN or infinite` : ''
    lines[0].textContent = d.where[c]
    lines[1].textContent =
      bin + ': ' + (!isGone(d, v, c) ? count + share + lost : all ? `all ${number(all)} NaN or infinite` : 'no elements')
  }

  const choose = async i => {
    const layer = d.layers[wanted = i]
    options.forEach((o, k) => { o.setAttribute('aria-selected', k == i); o.tabIndex = k == i ? 0 : -1 })
    try { if (!cache.has(i)) cache.set(i, await unpack(layer.data, C, d.rows * C)) }
    catch (e) { lines[0].textContent = 'This browser can\u2019t unpack the picture; a newer one can. ' + e; return }
    if (wanted != i) return // the reader has chosen another one meanwhile
    v = cache.get(chosen = i)
    name.textContent = layer.name
    which.textContent = d.layers.length > 1 ? ` \u00b7 layer ${i + 1} of ${d.layers.length}` : ''
    canvas.setAttribute('aria-label',
      `Heat map of ${layer.name}: ${d.xlabel} from left to right, ${layer.what} upwards, ${d.bar} as colour. Arrow keys read the counts.`)
    draw()
    Object.assign(root.dataset, { decoded: cache.size, layer: i })
  }
  const options =
    d.layers.map((l, i) => Object.assign(el('button', list, l.name, { type: 'button', role: 'option' }), { onclick: () => choose(i) }))

  list.onkeydown = e => {
    const last = options.length - 1,
      to = { ArrowDown: wanted + 1, ArrowUp: wanted - 1, Home: 0, End: last }[e.key]
    if (to !== undefined) { e.preventDefault(); options[clamp(to, 0, last)].focus(); choose(clamp(to, 0, last)) }
  }
  canvas.onkeydown = e => {
    const [c, r] = at || [0, B >> 1],
      far = e.shiftKey ? 10 : 1
    const to = {
      ArrowLeft: [c - far, r], ArrowRight: [c + far, r], ArrowUp: [c, r + far], ArrowDown: [c, r - far],
      Home: [0, r], End: [C - 1, r], Escape: null }[e.key]
    if (v && to !== undefined) { e.preventDefault(); at = to; tell() }
  }
  canvas.onpointermove = canvas.onpointerdown = e => {
    const on = G && d.layers[chosen].edges && G.colAt(e.offsetX) >= 0,
      r = on ? G.rowAt(e.offsetY) : -1
    if (G) { at = r < 0 ? null : [strongest(d, v, r, G.colsAt(e.offsetX - .5, 1)), r]; tell() }
  }
  canvas.onpointerleave = e => { if (e.pointerType == 'mouse') { at = null; tell() } }
  canvas.onpointerenter = same.onchange = root.bnDraw = draw // on entry too, because a notebook may have changed its theme

  new ResizeObserver(draw).observe(plot)
  choose(0)
}

const again = () => document.querySelectorAll('.bnheat[data-ready]').forEach(r => r.bnDraw?.()),
  later = () => requestAnimationFrame(again) // by then the page has its new colours
for (const q of ['print', '(prefers-color-scheme: dark)']) matchMedia(q).addEventListener('change', later)
addEventListener('resize', later)
for (const when of ['beforeprint', 'afterprint']) addEventListener(when, () => { printing = when == 'beforeprint'; again() })
