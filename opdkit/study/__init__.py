"""Several runs together: comparisons, and the page that shows them."""
