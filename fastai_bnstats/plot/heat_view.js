// The picture of one layer with its crosshair and read-out, and a list of names to choose from.

let printing = false

// A list that clicks and arrow keys choose from; long lists have a search field. `choose` is called with the index.
const nameList = (into, names, choose) => {
  const search = names.length > 12 ? el('input', into, '', { type: 'search', placeholder: 'search', 'aria-label': 'search layers' }) : null,
    list = el('div', into, '', { class: 'bnheat-list', role: 'listbox', 'aria-label': 'layers' })
  const options = names.map((name, i) => Object.assign(el('button', list, name, { type: 'button', role: 'option' }), { onclick: () => choose(i) })),
    shown = () => [...list.children].filter(o => !o.hidden),
    go = o => { if (o) { o.focus(); o.click() } }
  list.onkeydown = e => {
    const all = shown(),
      at = all.indexOf(document.activeElement),
      to = { ArrowDown: at + 1, ArrowUp: at - 1, Home: 0, End: all.length - 1 }[e.key]
    if (to !== undefined) { e.preventDefault(); go(all[clamp(to, 0, all.length - 1)]) }
  }
  const find = () => options.forEach((o, i) => { o.hidden = !names[i].toLowerCase().includes(search.value.trim().toLowerCase()) })
  if (search) Object.assign(search, {
    oninput: find,
    onkeydown: e => {
      if (e.key == 'Escape') { search.value = ''; find() }
      if (e.key == 'Enter' || e.key == 'ArrowDown') { e.preventDefault(); go(shown()[0]) }
    } })
  const select = i => options.forEach((o, k) => { o.setAttribute('aria-selected', k == i); o.tabIndex = k == i ? 0 : -1 })
  return { list, options, select }
}

const checkbox = (into, text, change) => {
  const label = el('label', into),
    box = el('input', label, '', { type: 'checkbox' })
  label.append(text)
  box.onchange = change
  return box
}

// Of each bin, the count minus that of the first minibatch, also a sum over each column.
const changes = (d, layer, v) => {
  const C = d.starts.length - 1,
    out = v.slice()
  layer.first.forEach((n, r) => { for (let c = 0; c < C; c++) out[r * C + c] -= n * (d.starts[c + 1] - d.starts[c]) })
  return out
}

// One picture in `main`; `root` is the element of the class bnheat around it. `pointed` is called with the column under the pointer or null.
const heatView = (main, root, d, pointed = () => {}) => {
  const C = d.starts.length - 1,
    B = d.rows - 4,
    cache = new Map(),
    signed = { ...d, signed: true, change: true, bar: 'change of the count' }
  const head = el('div', main, '', { class: 'bnheat-head' }),
    name = el('b', head),
    which = el('span', head),
    change = d.signed ? {} : checkbox(head, 'change since the first minibatch', () => turn()),
    plot = el('div', main, '', { class: 'bnheat-plot' })
  const canvas = el('canvas', plot, '', { tabindex: 0, role: 'img' }),
    cross = [el('i', plot), el('i', plot)]
  el('small', main, d.note)
  const read = el('div', main, '', { class: 'bnheat-read', role: 'status' }),
    lines = [el('div', read), el('b', read)]

  // wanted: the layer that was asked for; chosen: the layer on the canvas, which follows as soon as its counts are unpacked;
  // now: what is drawn, d or the changes; v: its numbers; at: column and row under the crosshair; other: column marked from outside
  let wanted = 0, chosen = 0, now = d, v = null, G = null, at = null, other = null, same = false

  const topOf = l => now.change ? l.change : l.top
  const draw = () => {
    const w = plot.clientWidth,
      layer = d.layers[chosen],
      h = Math.round(clamp(w * .62, 330, 520))
    if (!w || !v) return
    const dpr = Math.max(devicePixelRatio || 1, printing ? 2 : 1),
      look = getComputedStyle(root),
      g = canvas.getContext('2d'),
      any = r => cache.get(chosen).subarray(r * C, r * C + C).some(n => n)
    const top = same ? Math.max(...d.layers.map(topOf)) : topOf(layer),
      max = squash(top) || 1
    Object.assign(canvas, { width: Math.round(w * dpr), height: Math.round(h * dpr) })
    G = geometry(d, layer, w, h, [any(0), any(B + 1)])
    if (layer.edges) paint(now, v, max, G, g, dpr)
    g.scale(dpr, dpr)
    decorate(now, layer, top, max, G, g, printing ? '#000' : look.color, look.fontFamily)
    canvas.dataset.plot = [G.x, G.y, G.W, G.H]
    tell()
  }

  // Move the crosshair, and write the two lines below the picture.
  const tell = () => {
    const e = d.layers[chosen].edges,
      on = at && e,
      c = on ? clamp(at[0], 0, C - 1) : other,
      [px, py] = G && c !== null ? G.middle(c, on ? clamp(at[1], +!G.strips[0], B + G.strips[1]) : 1) : []
    cross[0].hidden = c === null || !e
    cross[1].hidden = !on
    if (!cross[0].hidden) {
      const y0 = G.strips[1] ? G.band[1] : G.y,
        y1 = G.strips[0] ? G.band[0] + 12 : G.y + G.H
      cross[0].style = `left: ${px}px; top: ${y0}px; width: 1px; height: ${y1 - y0}px`
    }
    if (on) cross[1].style = `left: ${G.x}px; top: ${py}px; width: ${G.W}px; height: 1px`
    if (!on) return lines.forEach((l, i) =>
      l.textContent = i ? '' : other !== null ? d.where[other] : 'Point at the picture to read a count, or focus it and use the arrow keys.')
    const r = clamp(at[1], +!G.strips[0], B + G.strips[1]),
      n = d.starts[c + 1] - d.starts[c],
      get = k => v[k * C + c] / n
    at = [c, r]
    const p = power(e),
      edge = k => fixed(e[k] / 10 ** p, (e[B] - e[0]) / B / 10 ** p, 2),
      all = get(d.rows - 1),
      bad = get(d.rows - 2)
    const bin =
      (r == 0 ? 'below ' + edge(0) : r > B ? 'above ' + edge(B) : edge(r - 1) + ' to ' + edge(r)) + (p ? ' \u00d710' + sup(p) : '')
    const word = now.change ? 'change' : now.signed ? 'difference' : 'count',
      count = `${word} ${now.signed && get(r) > 0 ? '+' : ''}${number(get(r))}` + (n > 1 ? ` (mean of ${n} minibatches)` : '')
    const share = all ? `, ${number(get(r) / all * 100, { maximumSignificantDigits: 3 })} % of ${number(all)}` : '',
      lost = bad ? `; ${number(bad)} NaN or infinite` : ''
    lines[0].textContent = d.where[c]
    lines[1].textContent =
      bin + ': ' + (!isGone(now, v, c) ? count + share + lost : all ? `all ${number(all)} NaN or infinite` : 'no elements')
  }

  const turn = () => {
    const layer = d.layers[chosen]
    now = change.checked ? signed : d
    v = cache.get(chosen)
    if (now.change) v = changes(d, layer, v)
    canvas.setAttribute('aria-label',
      `Heat map of ${layer.name}: ${d.xlabel} from left to right, ${layer.what} upwards, ${now.bar} as colour. Arrow keys read the counts.`)
    draw()
  }
  const show = async i => {
    wanted = i
    try { if (!cache.has(i)) cache.set(i, await unpack(d.layers[i].data, C, d.rows * C)) }
    catch (e) { lines[0].textContent = 'This browser can\u2019t unpack the picture; a newer one can. ' + e; return }
    if (wanted != i) return // the reader has chosen another one meanwhile
    chosen = i
    name.textContent = d.layers[i].name
    which.textContent = d.layers.length > 1 ? ` \u00b7 layer ${i + 1} of ${d.layers.length}` : ''
    turn()
    Object.assign(root.dataset, { decoded: cache.size, layer: i })
  }
  const point = to => { at = to; tell(); pointed(at && at[0]) }

  canvas.onkeydown = e => {
    const [c, r] = at || [other ?? 0, B >> 1],
      far = e.shiftKey ? 10 : 1
    const to = {
      ArrowLeft: [c - far, r], ArrowRight: [c + far, r], ArrowUp: [c, r + far], ArrowDown: [c, r - far],
      Home: [0, r], End: [C - 1, r], Escape: null }[e.key]
    if (v && to !== undefined) { e.preventDefault(); point(to) }
  }
  canvas.onpointermove = canvas.onpointerdown = e => {
    const on = G && d.layers[chosen].edges && G.colAt(e.offsetX) >= 0,
      r = on ? G.rowAt(e.offsetY) : -1
    if (G) point(r < 0 ? null : [strongest(now, v, r, G.colsAt(e.offsetX - .5, 1)), r])
  }
  canvas.onpointerleave = e => { if (e.pointerType == 'mouse') point(null) }
  canvas.onpointerenter = root.bnDraw = draw // on entry too, because a notebook may have changed its theme
  new ResizeObserver(draw).observe(plot)
  return { show, mark: c => { if (!at) { other = c; if (G) tell() } }, share: on => { same = on; draw() } }
}

const again = () => document.querySelectorAll('.bnheat[data-ready]').forEach(r => r.bnDraw?.()),
  later = () => requestAnimationFrame(again) // by then the page has its new colours
for (const q of ['print', '(prefers-color-scheme: dark)']) matchMedia(q).addEventListener('change', later)
addEventListener('resize', later)
for (const when of ['beforeprint', 'afterprint']) addEventListener(when, () => { printing = when == 'beforeprint'; again() })
