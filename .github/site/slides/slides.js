// A slide that is too tall for the screen is drawn smaller, so that nothing is cut.
const fits = (slide, scale) => {
  slide.style.zoom = scale;
  return slide.scrollHeight * scale <= 705 && slide.scrollWidth * scale <= 1281;
};
const fit = (event) => {
  const slide = event.currentSlide;
  let scale = 1; // found by steps, since lines break elsewhere at each
  while (!fits(slide, scale) && scale > 0.3) scale -= 0.04;
  slide.dataset.scale = scale.toFixed(2);
};
Reveal.on("ready", fit);
Reveal.on("slidechanged", fit);
const start = () => Reveal.initialize({
  width: 1280, height: 720, margin: 0, center: false, hash: true, controls: true, progress: true,
  slideNumber: "c/t", transition: "none", viewDistance: 1, navigationMode: "linear",
  plugins: [RevealNotes], // S shows what to say
});
window.addEventListener("load", () => MathJax.startup.promise.then(start)); // formulas have heights
