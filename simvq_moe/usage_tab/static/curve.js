// Thousands of codes as a sorted curve: load by rank, on a scale of powers of ten.

import { drawn, element, number, plural, whole } from './dom.js';
import { colourOfLine } from './colours.js';
import { short, ticks } from './chart.js';

const LEFT = 46;
const RIGHT = 10;
const TOP = 8;
const BOTTOM = 34;
const LOWEST = -2;
const HIGHEST = 2;

export class SortedCurve {
  // layers: [{ index, name, kind, slots }]; onSlot(layer index, slot)
  constructor(layers, onSlot) {
    this.layers = layers;
    this.onSlot = onSlot;
    this.at = [0, 0];
    this.frame = element('div', {
      class: 'chart curve', tabindex: 0, role: 'application',
      'aria-roledescription': 'sorted curve',
    });
    this.readout = element('p', { class: 'heat-readout', 'aria-live': 'polite' });
    this.legend = element('div', { class: 'legend' });
    this.node = element('div', {}, this.legend, this.frame, this.readout);
    this.frame.addEventListener('pointermove', (event) => this.point(event));
    this.frame.addEventListener('click', () => this.choose());
    this.frame.addEventListener('keydown', (event) => this.press(event));
  }

  // rows: of each layer { draws, dead, curve: { ranks, slots, counts } }
  show(step, rows) {
    this.step = step;
    this.rows = rows;
    this.draw();
  }

  load(row, i) {
    const { curve, draws } = this.rows[row];
    return draws ? (curve.counts[i] * this.layers[row].slots) / draws : 0;
  }

  draw() {
    const width = this.frame.clientWidth;
    if (!this.rows || !width) return;
    const height = Math.round(Math.max(200, Math.min(320, width * 0.4)));
    const most = Math.max(...this.layers.map((layer) => layer.slots));
    const zero = height - BOTTOM;
    const floor = zero - 22;
    this.px = (rank) => LEFT + (rank / Math.max(1, most - 1)) * (width - LEFT - RIGHT);
    this.py = (load) => {
      if (load <= 0) return zero;
      const at = Math.min(HIGHEST, Math.max(LOWEST, Math.log10(load)));
      return floor - ((at - LOWEST) / (HIGHEST - LOWEST)) * (floor - TOP);
    };
    const svg = drawn('svg', { width, height, viewBox: `0 0 ${width} ${height}` });
    for (const load of [100, 10, 1, 0.1, 0.01, 0]) {
      const y = this.py(load);
      svg.append(
        drawn('line', { class: load === 1 ? 'level' : 'grid', x1: LEFT, x2: width - RIGHT, y1: y, y2: y }),
        drawn('text', { class: 'tick', x: LEFT - 5, y: y + 4, 'text-anchor': 'end' },
          load === 0 ? 'dead' : String(load)),
      );
    }
    for (const tick of ticks(0, most - 1, Math.max(2, width / 120))) {
      svg.append(drawn('text', {
        class: 'tick', x: this.px(tick), y: zero + 16, 'text-anchor': tick ? 'middle' : 'start',
      }, short(tick)));
    }
    svg.append(
      drawn('line', { class: 'axis', x1: LEFT, x2: width - RIGHT, y1: zero, y2: zero }),
      drawn('text', {
        class: 'label', x: (LEFT + width - RIGHT) / 2, y: height - 3, 'text-anchor': 'middle',
      }, 'rank of the code, by load'),
      drawn('text', {
        class: 'label', x: 10, y: zero / 2, 'text-anchor': 'middle', transform: `rotate(-90 10 ${zero / 2})`,
      }, 'load (1 = fair share)'),
    );
    this.rows.forEach((row, i) => {
      const points = row.curve.ranks.map(
        (rank, j) => `${this.px(rank).toFixed(1)},${this.py(this.load(i, j)).toFixed(1)}`,
      );
      svg.append(drawn('polyline', {
        class: 'line strong', points: points.join(' '), stroke: colourOfLine(i),
      }));
    });
    this.dot = drawn('circle', { class: 'dot', r: 5, visibility: 'hidden' });
    svg.append(this.dot);
    this.frame.replaceChildren(svg);
    this.label();
  }

  label() {
    const said = this.rows.map((row, i) => {
      const dead = Math.round(row.dead * this.layers[i].slots);
      return `${this.layers[i].name}: ${whole(dead)} of ${plural(this.layers[i].slots, 'code')} dead`;
    });
    this.legend.replaceChildren(...said.map((text, i) => element(
      'span', {}, element('i', { style: `background:${colourOfLine(i)}` }), text,
    )));
    this.frame.setAttribute('aria-label', `Load of codes by rank at step ${this.step}. `
      + `${said.join('; ')}. Arrow keys go along the curve; Enter shows a code over time.`);
  }

  point(event) {
    const box = this.frame.getBoundingClientRect();
    const [x, y] = [event.clientX - box.left, event.clientY - box.top];
    let best = [Infinity, 0, 0];
    this.rows.forEach((row, i) => row.curve.ranks.forEach((rank, j) => {
      const far = Math.abs(this.px(rank) - x) + 0.3 * Math.abs(this.py(this.load(i, j)) - y);
      if (far < best[0]) best = [far, i, j];
    }));
    this.tell([best[1], best[2]]);
  }

  press(event) {
    const [row, i] = this.at;
    const end = this.rows[row].curve.ranks.length - 1;
    const moves = {
      ArrowLeft: [row, Math.max(0, i - 1)], ArrowRight: [row, Math.min(end, i + 1)],
      ArrowUp: [Math.max(0, row - 1), i],
      ArrowDown: [Math.min(this.rows.length - 1, row + 1), i], Home: [row, 0], End: [row, end],
    };
    if (event.key === 'Enter' || event.key === ' ') this.choose();
    else if (moves[event.key]) this.tell(moves[event.key]);
    else return;
    event.preventDefault();
  }

  tell([row, i]) {
    const { curve } = this.rows[row];
    const at = Math.min(i, curve.ranks.length - 1);
    this.at = [row, at];
    this.dot.setAttribute('cx', this.px(curve.ranks[at]));
    this.dot.setAttribute('cy', this.py(this.load(row, at)));
    this.dot.setAttribute('visibility', 'visible');
    this.readout.textContent = `${this.layers[row].name}, code ${curve.slots[at]}, rank `
      + `${whole(curve.ranks[at])}: load ${number(this.load(row, at))}, `
      + `${whole(curve.counts[at])} draws at step ${whole(this.step)}`;
  }

  choose() {
    const [row, i] = this.at;
    this.onSlot(this.layers[row].index, this.rows[row].curve.slots[i]);
  }
}
