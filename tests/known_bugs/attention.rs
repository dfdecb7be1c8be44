//! Attention over clusters: caches, routing, selection.
