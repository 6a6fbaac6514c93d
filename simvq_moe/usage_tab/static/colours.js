// One scale of load for every heat map: white is the fair share, each step of the bar doubles it.
// The colours are ColorBrewer's RdBu, which the colour-blind tell apart.

import { element } from './dom.js';

const STOPS = [
  '#053061', '#2166ac', '#4393c3', '#92c5de', '#d1e5f0', '#ffffff',
  '#fddbc7', '#f4a582', '#d6604d', '#b2182b', '#67001f',
];
const DOUBLINGS = 3;
export const DEAD = '#000000';
const TICKS = [[-3, '⅛'], [-2, '¼'], [-1, '½'], [0, '1'], [1, '2'], [2, '4'], [3, '8']];

const channels = STOPS.map((stop) => [1, 3, 5].map((at) => parseInt(stop.slice(at, at + 2), 16)));

export function colourOfLoad(load) {
  if (load === 0) return DEAD;
  const share = (Math.log2(load) / DOUBLINGS + 1) / 2;
  const at = Math.min(1, Math.max(0, share)) * (STOPS.length - 1);
  const below = Math.min(STOPS.length - 2, Math.floor(at));
  const mixed = channels[below].map(
    (from, i) => Math.round(from + (at - below) * (channels[below + 1][i] - from)),
  );
  return `rgb(${mixed.join(',')})`;
}

export function colourBar() {
  const ticks = TICKS.map(([at, text]) => element(
    'span', { class: 'tick', style: `left:${(100 * (at / DOUBLINGS + 1)) / 2}%` }, text,
  ));
  return element(
    'div',
    {
      class: 'colour-bar',
      role: 'img',
      'aria-label': 'Colour bar: black is dead, blue is below the fair share, white is the fair '
        + 'share, 1, and red is above; from an eighth to eight times the fair share.',
    },
    element('span', { class: 'bar-name' }, 'load (1 = fair share)'),
    element('span', { class: 'dead-swatch' }),
    element('span', { class: 'dead-name' }, 'dead'),
    element(
      'span', { class: 'bar' },
      element('span', { class: 'ramp', style: `background:linear-gradient(90deg,${STOPS})` }),
      ...ticks,
    ),
  );
}

// Lines: Okabe and Ito's colours in the tones of the theme, in style.css.
const LINES = 6;

export function colourOfLine(i) {
  return `var(--line-${i % LINES})`;
}
