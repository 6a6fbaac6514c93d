// A line chart with axes, reference levels, bands and a readout under the pointer.

import { drawn, element, whole } from './dom.js';

const LEFT = 46;
const RIGHT = 10;
const TOP = 8;
const BOTTOM = 34;
const NARROWEST = 160;
const LISTED = 8;

// Ticks at 1, 2 or 5 times a power of ten.
export function ticks(low, high, about) {
  const raw = (high - low) / Math.max(1, about) || 1;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((m) => m * power).find((one) => one >= raw * 0.999);
  const found = [];
  for (let at = Math.ceil(low / step - 1e-9); at * step <= high + step * 1e-9; at += 1) {
    found.push(Number((at * step).toPrecision(12)));
  }
  return found;
}

export function short(value) {
  const size = Math.abs(value);
  if (size >= 1e6) return `${Number((value / 1e6).toPrecision(3))}M`;
  if (size >= 1e4) return `${Number((value / 1e3).toPrecision(3))}k`;
  return String(Number(value.toPrecision(6)));
}

// chart({ title, x: {label, range}, y: {label, range, format}, lines, bands, levels, marker })
//   lines   [{ name, x: [], y: [], colour, strong }], null is a gap
//   bands   [{ x: [], low: [], high: [], colour }]
//   levels  [{ name, value }], dashed across
//   marker  a step that is marked
export function chart(plan, { width: room, height }) {
  const width = Math.max(NARROWEST, room);
  const [x0, x1] = spread(plan.x.range);
  const [y0, y1] = spread(plan.y.range);
  const right = width - RIGHT;
  const bottom = height - BOTTOM;
  const px = (x) => LEFT + ((x - x0) / (x1 - x0)) * (right - LEFT);
  const py = (y) => bottom - ((y - y0) / (y1 - y0)) * (bottom - TOP);
  const format = plan.y.format || short;
  const svg = drawn('svg', {
    width, height, viewBox: `0 0 ${width} ${height}`, role: 'img', 'aria-label': described(plan),
  });
  for (const tick of ticks(y0, y1, Math.max(2, Math.floor(height / 55)))) {
    svg.append(
      drawn('line', { class: 'grid', x1: LEFT, x2: right, y1: py(tick), y2: py(tick) }),
      drawn('text', { class: 'tick', x: LEFT - 5, y: py(tick) + 4, 'text-anchor': 'end' },
        format(tick)),
    );
  }
  for (const tick of ticks(x0, x1, Math.max(2, Math.floor(width / 70)))) {
    const anchor = px(tick) > right - 14 ? 'end' : px(tick) < LEFT + 14 ? 'start' : 'middle';
    svg.append(
      drawn('line', { class: 'notch', x1: px(tick), x2: px(tick), y1: bottom, y2: bottom + 4 }),
      drawn('text', { class: 'tick', x: px(tick), y: bottom + 16, 'text-anchor': anchor },
        short(tick)),
    );
  }
  svg.append(
    drawn('line', { class: 'axis', x1: LEFT, x2: right, y1: bottom, y2: bottom }),
    drawn('text', { class: 'label', x: (LEFT + right) / 2, y: height - 3, 'text-anchor': 'middle' },
      plan.x.label),
  );
  if (plan.y.label) {
    const at = (TOP + bottom) / 2;
    svg.append(drawn('text', {
      class: 'label', x: 10, y: at, 'text-anchor': 'middle', transform: `rotate(-90 10 ${at})`,
    }, plan.y.label));
  }
  for (const band of plan.bands || []) {
    const there = band.x.map((_, i) => i).filter((i) => band.low[i] !== null);
    const edge = (values, order) => order.map((i) => `${px(band.x[i])},${py(values[i])}`);
    const points = [...edge(band.high, there), ...edge(band.low, [...there].reverse())].join(' ');
    svg.append(drawn('polygon', { class: 'band', points, fill: band.colour }));
  }
  for (const level of plan.levels || []) {
    const y = py(level.value);
    svg.append(drawn('line', { class: 'level', x1: LEFT, x2: right, y1: y, y2: y }));
  }
  for (const line of plan.lines) {
    svg.append(drawn('path', {
      class: line.strong ? 'line strong' : 'line', d: path(line, px, py), stroke: line.colour,
    }));
    if (line.x.length === 1 && line.y[0] !== null) {
      svg.append(drawn('circle', { cx: px(line.x[0]), cy: py(line.y[0]), r: 3, fill: line.colour }));
    }
  }
  if (plan.marker !== undefined && plan.marker >= x0 && plan.marker <= x1) {
    const at = px(plan.marker);
    svg.append(drawn('line', { class: 'marker', x1: at, x2: at, y1: TOP, y2: bottom }));
  }
  return element('div', { class: 'chart' }, svg, readout(plan, svg, { px, py, format, width, bottom }));
}

function spread([low, high]) {
  return high > low ? [low, high] : [low - 0.5, high + 0.5];
}

function path(line, px, py) {
  let pen = 'M';
  let d = '';
  line.x.forEach((x, i) => {
    if (line.y[i] === null) { pen = 'M'; return; }
    d += `${pen}${px(x).toFixed(1)},${py(line.y[i]).toFixed(1)}`;
    pen = 'L';
  });
  return d;
}

function described(plan) {
  const format = plan.y.format || short;
  const ends = plan.lines.slice(0, LISTED).map((line) => {
    const last = line.y.length - 1;
    return line.y[last] === null || last < 0
      ? `${line.name}: none` : `${line.name}: ${format(line.y[0])} to ${format(line.y[last])}`;
  });
  const levels = (plan.levels || []).map((level) => `${level.name}: ${format(level.value)}`);
  return `${plan.title} over ${plan.x.label}. ${[...ends, ...levels].join('; ')}.`;
}

// What the lines are at the step under the pointer.
function readout(plan, svg, { px, format, width, bottom }) {
  const box = element('div', { class: 'readout', hidden: true });
  const rule = drawn('line', { class: 'rule', y1: TOP, y2: bottom, visibility: 'hidden' });
  svg.append(rule);
  svg.addEventListener('pointermove', (event) => {
    const at = event.clientX - svg.getBoundingClientRect().left;
    const x = nearest(plan.lines, at, px);
    if (x === null) return;
    rule.setAttribute('x1', px(x));
    rule.setAttribute('x2', px(x));
    rule.setAttribute('visibility', 'visible');
    const named = plan.lines.map((line) => ({ line, y: line.y[line.x.indexOf(x)] }))
      .filter((one) => one.y !== undefined && one.y !== null)
      .sort((a, b) => Boolean(b.line.strong) - Boolean(a.line.strong) || b.y - a.y);
    const rows = named.slice(0, LISTED).map(({ line, y }) => element(
      'div', {}, element('i', { style: `background:${line.colour}` }), `${line.name}: ${format(y)}`,
    ));
    const more = named.length > LISTED ? [element('div', {}, `and ${named.length - LISTED} more`)] : [];
    box.replaceChildren(element('b', {}, `${plan.x.label} ${whole(x)}`), ...rows, ...more);
    box.hidden = false;
    const left = px(x) > width / 2 ? px(x) - box.offsetWidth - 8 : px(x) + 8;
    box.style.left = `${Math.max(0, left)}px`;
  });
  svg.addEventListener('pointerleave', () => {
    box.hidden = true;
    rule.setAttribute('visibility', 'hidden');
  });
  return box;
}

function nearest(lines, at, px) {
  let best = null;
  for (const line of lines) {
    for (const x of line.x) {
      if (best === null || Math.abs(px(x) - at) < Math.abs(px(best) - at)) best = x;
    }
  }
  return best;
}
