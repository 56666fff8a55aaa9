// The picture on the canvas. d: the content that interactive.py made; v: the unpacked counts of one layer;
// G: its geometry; g: the canvas context; max: log1p of the count that has the last colour.

// Places in CSS pixels. Rows: 0 lies below the edges, 1 to B are the bins, B+1 lies above.
const geometry = (d, layer, w, h, strips) => {
  const e = layer.edges,
    B = d.rows - 4,
    T = d.starts.at(-1),
    x = 62,
    y = 52,
    W = Math.max(40, w - x - 88),
    H = h - y - 58,
    of = new Uint32Array(T)
  d.starts.slice(0, -1).forEach((s, c) => of.fill(c, s, d.starts[c + 1]))
  const xOf = row => x + row / T * W,
    yOf = v => y + H * (1 - (v - e[0]) / (e[B] - e[0])),
    band = [y + H + 4, y - 16]
  const rowAt = py => {
    for (const s of [0, 1]) if (strips[s] && py >= band[s] && py < band[s] + 12) return s * (B + 1)
    if (py < y || py >= y + H) return -1
    return 1 + clamp(e.findIndex(v => yOf(v) <= py) - 1, 0, B - 1)
  }
  const colAt = px => px < x || px >= x + W ? -1 : of[Math.floor((px - x) / W * T)]
  // The columns from `px` to `px + wide`, as [first, one after the last]. Of a column wider than that, only its middle counts.
  const colsAt = (px, wide) => {
    const at = q => of[clamp(Math.floor((q - x) / W * T), 0, T - 1)],
      first = at(px), end = px + wide >= x + W ? of[T - 1] + 1 : at(px + wide)
    return end - first > 1 ? [first, end] : [at(px + wide / 2), at(px + wide / 2) + 1]
  }
  const middle = (c, r) => [
    (xOf(d.starts[c]) + xOf(d.starts[c + 1])) / 2,
    r == 0 || r > B ? band[+(r > 0)] + 6 : (yOf(e[r - 1]) + yOf(e[r])) / 2]
  return { x, y, W, H, B, T, C: d.starts.length - 1, strips, xOf, yOf, band, rowAt, colAt, colsAt, middle }
}

// Is nothing left to count in column c? It is drawn grey, which differs from the colour of zero.
const isGone = (d, v, c) => {
  const C = d.starts.length - 1,
    at = r => v[r * C + c]
  return d.signed && !d.change ? Array.from({ length: d.rows }, (_, r) => at(r)).every(n => !n) : at(d.rows - 1) == at(d.rows - 2)
}

// The column with the largest mean count in row r; one without finite values hides the others, one without elements is hidden.
const strongest = (d, v, r, [first, end]) => {
  const C = d.starts.length - 1
  const size = c => !isGone(d, v, c) ? Math.abs(v[r * C + c]) / (d.starts[c + 1] - d.starts[c]) : v[(d.rows - 1) * C + c] ? Infinity : -1
  let best = first
  for (let c = first + 1; c < end; c++) if (size(c) > size(best)) best = c
  return best
}

// Position of a count in the colour map, from 0 to 1.
const level = (d, count, max) => d.signed ? (squash(count) / max + 1) / 2 : squash(count) / max

// The coloured cells.
const paint = (d, v, max, G, g, dpr) => {
  const { C, B, band } = G,
    colour = new Uint32Array((B + 2) * C)
  for (let c = 0; c < C; c++) {
    const n = d.starts[c + 1] - d.starts[c],
      gone = isGone(d, v, c)
    for (let i = c; i < colour.length; i += C)
      colour[i] = gone ? GONE : MAPS[+d.signed][clamp(Math.floor(level(d, v[i] / n, max) * 256), 0, 255)]
  }
  const X = Math.round(G.x * dpr),
    Y = Math.round(band[1] * dpr),
    w = Math.round(G.W * dpr),
    h = Math.round((band[0] + 12) * dpr) - Y
  const image = g.createImageData(w, h),
    pixels = new Uint32Array(image.data.buffer),
    cols = Array.from({ length: w }, (_, i) => G.colsAt((X + i) / dpr, 1 / dpr)),
    line = Array.from({ length: B + 2 }, (_, r) => Uint32Array.from(cols, span => colour[r * C + strongest(d, v, r, span)]))
  for (let j = 0; j < h; j++) {
    const r = G.rowAt((Y + j + .5) / dpr)
    if (r >= 0) pixels.set(line[r], j * w)
  }
  g.putImageData(image, X, Y)
}

// Everything around the cells: colour bar, ticks, labels, and the borders of epochs and fits.
const decorate = (d, layer, top, max, G, g, ink, family) => {
  const { x, y, W, H, T, xOf, yOf, band } = G,
    e = layer.edges,
    low = G.strips[0] ? band[0] + 12 : y + H,
    high = G.strips[1] ? band[1] : y,
    bar = x + W + 12
  const text = (s, px, py, align = 'center') => { g.textAlign = align; g.fillText(s, px, py) }
  const turned = (s, px) => { g.save(); g.translate(px, y + H / 2); g.rotate(-Math.PI / 2); text(s, 0, 0); g.restore() }
  const line = (x0, y0, x1, y1) => { g.beginPath(); g.moveTo(x0, y0); g.lineTo(x1, y1); g.stroke() }
  const cut = (s, room) => { let t = s; while (t && g.measureText(t).width > room) t = (s = s.slice(0, -1)) && s + '\u2026'; return t }
  const spans = list => list.map(([row, name], i) => [name, xOf(row), xOf(i + 1 < list.length ? list[i + 1][0] : T)])
  g.textBaseline = 'middle'

  for (let j = 0; j < H; j++) { // each rectangle reaches to the end of the bar, so that no seams are visible between them
    const v = MAPS[+d.signed][Math.floor((1 - (j + .5) / H) * 256)]
    Object.assign(g, { fillStyle: `rgb(${v & 255},${v >> 8 & 255},${v >> 16 & 255})` }).fillRect(bar, y + j, 12, H - j)
  }

  g.fillStyle = g.strokeStyle = ink
  g.font = '12px ' + family
  if (e) {
    const p = power(e),
      [at, step] = ticks(e[0] / 10 ** p, e.at(-1) / 10 ** p, Math.max(2, H / 45))
    for (const t of at) { const py = yOf(t * 10 ** p); line(x - 4, py, x, py); text(fixed(t, step), x - 7, py, 'right') }
    for (const s of [0, 1]) if (G.strips[s]) text(['below', 'above'][s], x - 7, band[s] + 6, 'right')
    turned(layer.what + (p ? ` (\u00d710${sup(p)})` : ''), 9)
  } else text('no data', x + W / 2, y + H / 2)

  for (const t of ticks(0, Math.max(1, T - 1), Math.max(2, W / 80))[0])
    if (t % 1 == 0) { line(xOf(t + .5), low + 2, xOf(t + .5), low + 6); text(number(t), xOf(t + .5), low + 15) }
  text(d.xlabel, x + W / 2, low + 34)

  text('epoch', x - 7, high - 11, 'right')
  let free = 0 // where the next label may begin
  for (const [k, a, b] of spans(d.epochs)) {
    const w = g.measureText(k).width
    if ((a + b - w) / 2 > free) { line(a, high - 4, a, high - 1); text(k, (a + b) / 2, high - 11); free = (a + b + w) / 2 + 8 }
  }

  free = 1e9
  for (const c of countTicks(top, d.signed)) {
    const py = y + H * (1 - level(d, c, max)),
      k = Math.abs(c)
    if (py < free - 13 && py > y - 1) {
      line(bar + 12, free = py, bar + 15, py)
      text(k < 1e5 ? number(c) : (c < 0 ? '\u2212' : '') + '10' + sup(Math.round(Math.log10(k))), bar + 18, py, 'left')
    }
  }
  turned(cut(d.bar, H + 90), bar + 70)

  g.font = 'bold ' + g.font
  for (const [name, a, b] of spans(d.fits)) text(cut(name, b - a - 4), (a + b) / 2, high - 27)
  for (const [list, lineWidth, dash] of [[d.epochs.length < W / 8 ? d.epochs : [], 1, [1, 3]], [d.fits, 1.5, []]]) {
    Object.assign(g, { lineWidth, strokeStyle: d.signed ? '#666' : '#fff' }).setLineDash(dash)
    for (const [row] of list.slice(1)) line(xOf(row), y, xOf(row), y + H)
  }
}
