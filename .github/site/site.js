// What scrolls sideways must be within reach of a keyboard too.
const reachable = () => {
  for (const box of document.querySelectorAll("pre, table, .math")) {
    if (box.scrollWidth > box.clientWidth + 1) box.tabIndex = 0;
  }
};
window.addEventListener("load", reachable);
window.addEventListener("resize", reachable);
