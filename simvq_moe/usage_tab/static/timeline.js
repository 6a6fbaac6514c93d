// The windows of a run: a slider, a button that plays them, and what is shown.

import { element, whole } from './dom.js';

const FRAME_MS = 150;
const FRAMES = 80;

export class Timeline {
  // onWindow(index): a promise that is kept once the window is shown
  constructor(onWindow) {
    this.onWindow = onWindow;
    this.steps = [];
    this.playing = false;
    this.button = element('button', { type: 'button', class: 'play', onclick: () => this.toggle() });
    this.slider = element('input', {
      type: 'range', min: 0, max: 0, step: 1, 'aria-label': 'Step',
      oninput: () => { this.stop(); this.go(Number(this.slider.value)); },
    });
    this.label = element('output', { class: 'step' });
    this.node = element('div', { class: 'timeline' }, this.button, this.slider, this.label);
    this.stop();
  }

  // Keep the place, or stay at the end where it was there.
  take(steps, { follow }) {
    const ended = this.index >= this.steps.length - 1;
    const step = this.steps[this.index];
    this.steps = steps;
    this.slider.max = steps.length - 1;
    const same = steps.findIndex((one) => one >= step);
    return this.go(follow || ended || same < 0 ? steps.length - 1 : same);
  }

  get index() {
    return Number(this.slider.value);
  }

  get step() {
    return this.steps[this.index];
  }

  go(index) {
    this.slider.value = index;
    const last = this.steps[this.steps.length - 1];
    this.label.textContent = `step ${whole(this.step)} of ${whole(last)}`;
    this.slider.setAttribute('aria-valuetext', this.label.textContent);
    return this.onWindow(index);
  }

  toggle() {
    if (this.playing) this.stop();
    else this.play();
  }

  stop() {
    this.playing = false;
    this.button.textContent = '▶';
    this.button.setAttribute('aria-label', 'Play');
  }

  async play() {
    this.playing = true;
    this.button.textContent = '⏸';
    this.button.setAttribute('aria-label', 'Pause');
    const stride = Math.max(1, Math.ceil(this.steps.length / FRAMES));
    let index = this.index >= this.steps.length - 1 ? 0 : this.index;
    while (this.playing) {
      const pause = new Promise((done) => { setTimeout(done, FRAME_MS); });
      await Promise.all([this.go(index), pause]);
      if (index >= this.steps.length - 1) this.stop();
      index = Math.min(this.steps.length - 1, index + stride);
    }
    // what stands still while it plays
    await this.onWindow(this.index);
  }
}
