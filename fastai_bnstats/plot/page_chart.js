// Curves over time as SVG: lines with bands, dots, a cursor, and the numbers under it.

const svgOf = into => { into.insertAdjacentHTML('beforeend', '<svg></svg>'); return into.lastElementChild }
const draws = svg => (tag, attrs, text = '') => {
  const e = svg.appendChild(document.createElementNS(svg.namespaceURI, tag))
  for (const k in attrs) e.setAttribute(k, attrs[k])
  e.textContent = text
  return e
}

// Four digits, with a power of ten where there would be many zeros.
const short = v => {
  if (Number.isNaN(v)) return 'NaN'
  if (!Number.isFinite(v)) return v > 0 ? '\u221e' : '\u2212\u221e'
  if (v == 0 || Math.abs(v) >= 1e-3 && Math.abs(v) < 1e5) return minus(String(+v.toPrecision(4)))
  const [m, p] = v.toExponential(3).split('e')
  return minus(String(+m)) + ' \u00d710' + sup(+p)
}

// Inverse of `pack_floats` in page.py: the first character is the number of bytes of a float.
const unpackFloats = async text => {
  const k = +text[0],
    raw = Uint8Array.from(atob(text.slice(1)), c => c.charCodeAt(0)),
    bytes = new Uint8Array(await new Response(new Blob([raw]).stream().pipeThrough(new DecompressionStream('deflate'))).arrayBuffer()),
    n = bytes.length / k,
    out = new Uint8Array(bytes.length)
  for (let p = 0; p < k; p++) for (let i = 0; i < n; i++) out[i * k + p] = bytes[p * n + i]
  return k == 4 ? new Float32Array(out.buffer) : new Float64Array(out.buffer)
}
// `count` series of an axis: each has a line, and a band from low to high if its columns have several values.
const lines = (floats, axis, count) => {
  const C = axis.starts.length - 1,
    per = floats.length / C / count,
    part = k => floats.subarray(k * C, k * C + C)
  return Array.from({ length: count }, (_, i) => per == 1 ? { y: part(i) } : { y: part(3 * i), lo: part(3 * i + 1), hi: part(3 * i + 2) })
}

const lastAtMost = (list, v) => { // index of the last element that is at most v, in a list that rises
  let a = 0, b = list.length - 1
  while (a < b) { const m = a + b + 1 >> 1; if (list[m] <= v) a = m; else b = m - 1 }
  return a
}

const logTicks = (lo, hi) => { // of logarithms: powers of ten, with 2 and 5 between if there are few, every n-th if there are many
  const at = [],
    wide = hi - lo
  for (let p = Math.floor(lo); p <= hi; p++)
    for (const m of wide < .3 ? [1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9] : wide < 2 ? [1, 2, 5] : [1])
      if (Math.log10(m) + p >= lo && Math.log10(m) + p <= hi && (wide < 6 || p % Math.ceil(wide / 5) == 0)) at.push(m * 10 ** p)
  return at.length < 2 ? ticks(10 ** lo, 10 ** hi, 6)[0] : at
}

// axis: columns, as time_axis in interactive.py makes them. of: title; lines: {name, colour, y, lo, hi, bad}; dots: {name, colour, x, y};
// log, height, names (are fits named above?), against: 'step' to number the steps instead of the rows. `pointed` is called with a column or null, `text(c)` gives the numbers at a column.
const chart = (into, axis, of, pointed, text) => {
  const C = axis.starts.length - 1,
    T = axis.starts.at(-1),
    fit = new Set(axis.fits.map(([row]) => row)),
    figure = el('figure', into, '', { class: 'chart' }),
    caption = el('figcaption', figure),
    box = el('div', figure, '', { class: 'curves', tabindex: 0, role: 'img' })
  el('b', caption, of.title)
  for (const l of of.legend || []) { el('i', caption, '', { style: `--c: ${l.colour}`, class: 'key ' + (l.dot ? 'dot' : '') }); caption.append(l.name) }
  const value = el('span', caption, '', { class: 'value' })
  const all = [...of.lines.flatMap(l => l.lo ? [l.lo, l.hi] : [l.y]), ...(of.dots || []).map(l => l.y)]
  let log = of.log, at = null, place = () => 0, cursor = null

  const range = log => {
    let lo = Infinity, hi = -Infinity
    for (const y of all) for (const v of y) if (Number.isFinite(v) && (!log || v > 0)) { if (v < lo) lo = v; if (v > hi) hi = v }
    return [lo, hi]
  }
  const [least, most] = range(true)
  if (log === undefined) log = range(false)[0] > 0 && most / least > 50
  if (of.choose && least < Infinity) {
    const b = checkbox(caption, 'logarithmic', () => { log = b.checked; draw() })
    b.checked = log
  }
  box.setAttribute('aria-label', `${of.title} against ${of.against || axis.xlabel}. Arrow keys read the values.`)

  const draw = () => {
    const w = box.clientWidth
    if (!w) return
    const h = of.height || 120,
      x0 = 54, x1 = w - 10, y0 = of.names ? 20 : 8, y1 = h - (of.xlabel ? 36 : 20)
    box.replaceChildren()
    const svg = svgOf(box),
      add = draws(svg)
    svg.setAttribute('viewBox', `0 0 ${w} ${h}`)
    svg.style.height = h + 'px'
    place = row => x0 + row / Math.max(1, T) * (x1 - x0)
    const x = c => place((axis.starts[c] + axis.starts[c + 1]) / 2),
      scale = v => log ? Math.log10(v) : v
    let [lo, hi] = range(log)
    const none = !(lo <= hi)
    if (none) [lo, hi] = [log ? 1 : 0, log ? 10 : 1]
    ;[lo, hi] = [scale(lo), scale(hi)]
    const pad = (hi - lo) * .06 || (log ? .3 : Math.abs(hi) * .1 || 1)
    lo -= pad; hi += pad
    const y = v => y1 - (scale(v) - lo) / (hi - lo) * (y1 - y0),
      ok = v => Number.isFinite(v) && (!log || v > 0)

    const p = log ? 0 : power([lo, hi]),
      some = n => ticks(lo / 10 ** p, hi / 10 ** p, n)
    let [linear, step] = some(Math.max(3, (y1 - y0) / 34))
    if (linear.length < 2) [linear, step] = some(6) // of about 3, a single one may lie within the range; of about 6, at least two do
    for (const t of log ? logTicks(lo, hi) : linear) {
      const v = log ? t : t * 10 ** p
      add('line', { class: 'grid', x1: x0, x2: x1, y1: y(v), y2: y(v) })
      add('text', { x: x0 - 5, y: y(v) + 4, 'text-anchor': 'end' }, log ? t < 1e3 ? short(t).replace('1 \u00d7', '') : t < 1e6 ? number(t) : '10' + sup(Math.round(Math.log10(t))) : fixed(t, step))
    }
    if (p) add('text', { x: 2, y: y0 + 2 }, '\u00d710' + sup(p))
    const many = Math.max(2, (x1 - x0) / 80)
    if (of.against) for (const t of ticks(axis.steps[0], Math.max(axis.steps[0] + 1, axis.steps.at(-1) - 1), many)[0]) {
      const c = lastAtMost(axis.steps, t),
        part = Math.min(1, (t - axis.steps[c] + .5) / (axis.steps[c + 1] - axis.steps[c] || 1))
      if (t % 1 == 0 && c < C) add('text', { x: place(axis.starts[c] + part * (axis.starts[c + 1] - axis.starts[c])), y: y1 + 14, 'text-anchor': 'middle' }, number(t))
    }
    else for (const t of ticks(0, Math.max(1, T - 1), many)[0])
      if (t % 1 == 0) add('text', { x: place(t + .5), y: y1 + 14, 'text-anchor': 'middle' }, number(t))
    if (of.xlabel) add('text', { x: (x0 + x1) / 2, y: y1 + 31, 'text-anchor': 'middle' }, axis.xlabel)
    if (axis.epochs.length < (x1 - x0) / 8) for (const [row] of axis.epochs.slice(1)) add('line', { class: 'epoch', x1: place(row), x2: place(row), y1: y0, y2: y1 })
    axis.fits.forEach(([row, name], i) => {
      if (i) add('line', { class: 'fit', x1: place(row), x2: place(row), y1: y0 - (of.names ? 14 : 0), y2: y1 })
      const room = place(i + 1 < axis.fits.length ? axis.fits[i + 1][0] : T) - place(row),
        fits = Math.floor(room / 7)
      if (of.names && fits > 2) add('text', { class: 'name', x: place(row) + room / 2, y: 12, 'text-anchor': 'middle' }, name.length > fits ? name.slice(0, fits - 1) + '\u2026' : name)
    })
    if (none) add('text', { x: (x0 + x1) / 2, y: (y0 + y1) / 2, 'text-anchor': 'middle' }, 'no finite values')

    const runs = seen => { // first and one after the last column of each unbroken piece
      const out = []
      for (let c = 0; c < C; c++) {
        if (!seen(c)) continue
        if (c && seen(c - 1) && !fit.has(axis.starts[c])) out.at(-1)[1] = c + 1
        else out.push([c, c + 1])
      }
      return out
    }
    const to = (c, v) => x(c).toFixed(1) + ',' + y(v).toFixed(1)
    for (const l of of.lines) {
      const colour = `--c: ${l.colour}`
      if (l.lo) for (const [a, b] of runs(c => ok(l.lo[c]) && ok(l.hi[c]))) {
        const cs = Array.from({ length: b - a }, (_, i) => a + i)
        add('polygon', { class: 'band', style: colour, points: [...cs.map(c => to(c, l.hi[c])), ...cs.reverse().map(c => to(c, l.lo[c]))].join(' ') })
      }
      const seen = runs(c => ok(l.y[c])),
        d = seen.map(([a, b]) => 'M' + Array.from({ length: b - a }, (_, i) => to(a + i, l.y[a + i])).join('L') + 'h0')
      add('path', { class: 'line', style: colour, d: d.join('') })
      for (const [a, b] of seen) if (b == a + 1) add('circle', { class: 'dot', style: colour, cx: x(a).toFixed(1), cy: y(l.y[a]).toFixed(1), r: 2 })
    }
    for (const l of of.dots || []) l.x.forEach((row, i) => {
      if (ok(l.y[i])) add('circle', { class: 'dot ' + (l.kind || ''), style: `--c: ${l.colour}`, cx: place(row).toFixed(1), cy: y(l.y[i]).toFixed(1), r: l.r || 2 })
    })
    let free = -9
    for (const l of of.lines) for (const [c] of l.bad || []) if (x(c) > free) {
      add('text', { class: 'bad', x: x(c), y: y0 + 8, 'text-anchor': 'middle' }, '\u00d7')
      free = x(c) + 5
    }
    cursor = add('line', { class: 'cursor', y1: y0, y2: y1 })
    mark(at)
  }

  const mark = c => {
    at = c
    value.textContent = c === null ? '' : text(c)
    if (!cursor) return
    cursor.style.display = c === null ? 'none' : ''
    if (c !== null) for (const k of ['x1', 'x2']) cursor.setAttribute(k, place((axis.starts[c] + axis.starts[c + 1]) / 2))
  }
  box.onpointermove = box.onpointerdown = e => {
    const px = e.clientX - box.getBoundingClientRect().left,
      row = (px - place(0)) / (place(T) - place(0)) * T
    pointed(row < 0 || row >= T ? null : lastAtMost(axis.starts, Math.floor(row)))
  }
  box.onpointerleave = e => { if (e.pointerType == 'mouse') pointed(null) }
  box.onkeydown = e => {
    const c = at ?? 0,
      far = e.shiftKey ? 10 : 1,
      next = { ArrowLeft: c - far, ArrowRight: at === null ? 0 : c + far, Home: 0, End: C - 1, Escape: null }[e.key]
    if (next !== undefined) { e.preventDefault(); pointed(next === null ? null : clamp(next, 0, C - 1)) }
  }
  const watch = new ResizeObserver(draw)
  watch.observe(box)
  return { axis, mark, figure, end: () => { watch.disconnect(); figure.remove() } }
}
