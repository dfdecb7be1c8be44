//! What a thread has run, for tests and benches: kernels, which can be compared with what a plan names, and how much of their work the
//! assignments of fits have done.

use std::cell::RefCell;

thread_local!(static LAUNCHES: RefCell<Option<Vec<String>>> = const { RefCell::new(None) });
thread_local!(static PASSES: RefCell<Option<Vec<PassWork>>> = const { RefCell::new(None) });

/// The work of an assignment.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PassWork {
    /// Products of rows and centroids that it has computed, as a share of all of the problems that had not converged: 1 where none is skipped.
    pub products: f64,
    /// Rows whose label it has changed, as a share of those problems' rows.
    pub moved: f64,
    /// Milliseconds that it has taken.
    pub ms: f64,
}

/// Notes a kernel, as `NAME_TYPE`, if the record has been started.
pub(crate) fn record(name: &str, of: &str) {
    LAUNCHES.with(|l| l.borrow_mut().iter_mut().for_each(|l| l.push(format!("{name}_{of}"))));
}

/// The kernels that this thread has run since it last asked; the first call starts the record.
pub fn launches() -> Vec<String> {
    LAUNCHES.with(|l| l.borrow_mut().replace(vec![]).unwrap_or_default())
}

/// Notes the work of an assignment, which is counted only if the record has been started.
pub(crate) fn record_pass(work: impl FnOnce() -> PassWork) {
    PASSES.with_borrow_mut(|passes| {
        if let Some(passes) = passes {
            passes.push(work());
        }
    });
}

/// The work of the assignments that this thread has asked for since it last asked for this; the first call starts the record.
pub fn passes() -> Vec<PassWork> {
    PASSES.with(|passes| passes.borrow_mut().replace(vec![]).unwrap_or_default())
}
