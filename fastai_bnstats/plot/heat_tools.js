// Helpers that don't touch the page, apart from `el`: colours, numbers, ticks and unpacking.

const el = (tag, into, text = '', attrs = {}) => {
  const e = into.appendChild(Object.assign(document.createElement(tag), { textContent: text }))
  for (const k in attrs) e.setAttribute(k, attrs[k])
  return e
}

// A pixel as canvas stores it: red is the lowest byte, alpha the highest.
const colours = hex => Uint32Array.from(hex.match(/.{6}/g), h => 0xff000000 | parseInt(h.slice(4) + h.slice(2, 4) + h.slice(0, 2), 16))
// heat_assets() in interactive.py replaces these two words with the 256 colours of matplotlib's maps.
const MAPS = [colours('COUNTS'), colours('CHANGES')],
  GONE = colours('bbbbbb')[0]

const clamp = (v, lo, hi) => Math.max(lo, Math.min(hi, v)),
  squash = c => Math.sign(c) * Math.log1p(Math.abs(c))

const minus = s => s.replace('-', '\u2212'),
  number = (v, how = { maximumFractionDigits: 2 }) => minus(v.toLocaleString('en', how))
const sup = n => String(n).replace(/./g, c => c == '-' ? '\u207b' : '\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079'[c])
// `power`: the power of ten that an axis label carries for all of its ticks, or 0 if they need none.
const magnitude = v => Math.floor(Math.log10(v) + 1e-9),
  power = e => { const p = magnitude(Math.max(...e.map(Math.abs))); return p < -3 || p > 5 ? p : 0 }
// Enough digits to distinguish two numbers that differ by `step`.
const fixed = (v, step, more = 0, k = clamp(more - magnitude(step), 0, 12)) => minus((+v.toFixed(k) || 0).toFixed(k))

const ticks = (lo, hi, n) => {
  const raw = (hi - lo) / n,
    p = 10 ** Math.floor(Math.log10(raw)),
    step = p * [1, 2, 5, 10].find(k => k * p >= raw * .999),
    first = Math.ceil(lo / step - 1e-9)
  return [Array.from({ length: Math.floor(hi / step + 1e-9) - first + 1 }, (_, k) => (first + k) * step), step]
}
// 0, 1, 10, 100, ...; every second power if there are many.
const countTicks = (top, signed) => {
  let at = [0, ...Array.from({ length: magnitude(Math.max(1, top)) + 1 }, (_, k) => 10 ** k)]
  if (at.length > 7) at = at.filter((_, i) => !i || i % 2)
  return signed ? [...at.slice(1).map(c => -c).reverse(), ...at] : at
}

// Inverse of `_pack` in interactive.py: inflate, join the bytes, undo the sign bit, sum the differences along time.
const unpack = async (text, cols, n) => {
  const raw = Uint8Array.from(atob(text), c => c.charCodeAt(0)),
    out = new Float64Array(n)
  const bytes = new Uint8Array(await new Response(new Blob([raw]).stream().pipeThrough(new DecompressionStream('deflate'))).arrayBuffer())
  for (let p = bytes.length - n; p >= 0; p -= n) for (let i = 0; i < n; i++) out[i] = out[i] * 256 + bytes[p + i]
  for (let i = 0; i < n; i++) out[i] = (out[i] % 2 ? -(out[i] + 1) / 2 : out[i] / 2) + (i % cols ? out[i - 1] : 0)
  return out
}
