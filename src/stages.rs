//! The stages of work that has to survive whatever ends it, for tests: at each a test may make a file operation fail, or end the process.

use crate::error::{Error, Result};
use std::{cell::RefCell, io};

/// A test's answer to a stage.
type Hook = Box<dyn FnMut(&'static str) -> io::Result<()>>;

thread_local!(static HOOK: RefCell<Option<Hook>> = const { RefCell::new(None) });

/// Tells a test that this thread has reached a stage. The error is the test's.
pub(crate) fn reach(stage: &'static str) -> io::Result<()> {
    HOOK.with(|hook| hook.borrow_mut().as_mut().map_or(Ok(()), |hook| hook(stage)))
}

/// The same for stages that are not those of a file.
pub(crate) fn reach_work(stage: &'static str) -> Result<()> {
    reach(stage).map_err(|source| Error::Io { path: stage.into(), source })
}

/// Has `hook` called at each stage that this thread reaches from now on; an error fails what the stage belongs to. None calls nothing.
pub fn on_stage(hook: Option<Hook>) {
    HOOK.set(hook);
}
