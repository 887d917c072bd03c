"""Everything that is drawn: chains as SVG, and the matplotlib pictures in one hand."""
