//! Codebooks, running means and their updates.
