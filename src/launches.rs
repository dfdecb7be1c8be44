//! The kernels that a thread has run, for tests: what a plan names can be compared with them.

use std::cell::RefCell;

thread_local!(static LAUNCHES: RefCell<Option<Vec<String>>> = const { RefCell::new(None) });

/// Notes a kernel, as `NAME_TYPE`, if the record has been started.
pub(crate) fn record(name: &str, of: &str) {
    LAUNCHES.with(|l| l.borrow_mut().iter_mut().for_each(|l| l.push(format!("{name}_{of}"))));
}

/// The kernels that this thread has run since it last asked; the first call starts the record.
pub fn launches() -> Vec<String> {
    LAUNCHES.with(|l| l.borrow_mut().replace(vec![]).unwrap_or_default())
}
