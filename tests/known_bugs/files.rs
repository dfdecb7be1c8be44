//! Files: everything that is read is checked.
