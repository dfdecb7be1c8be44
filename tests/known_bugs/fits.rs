//! Settings, refusals and fits at their extremes.
