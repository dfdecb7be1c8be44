//! Labels: no row or centroid may cost the others more than a constant, and none may be wrong.
