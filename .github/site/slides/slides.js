// A slide that is too tall for the screen is drawn smaller, so that nothing is cut.
const fit = (event) => {
  const slide = event.currentSlide;
  slide.style.zoom = 1;
  const scale = Math.min(1, 700 / slide.scrollHeight, 1240 / slide.scrollWidth);
  slide.style.zoom = scale;
  slide.dataset.scale = scale.toFixed(2);
};
Reveal.on("ready", fit);
Reveal.on("slidechanged", fit);
const start = () => Reveal.initialize({
  width: 1280, height: 720, margin: 0.02, center: false, hash: true, controls: true, progress: true,
  slideNumber: "c/t", transition: "none", viewDistance: 1, navigationMode: "linear",
});
window.addEventListener("load", () => MathJax.startup.promise.then(start)); // formulas have heights
