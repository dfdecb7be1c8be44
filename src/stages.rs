//! The stages of work that has to survive whatever ends it, for tests: at each a test may make a file operation fail, or end the process.
//! And reads of sources, which a test may cut short, interrupt or make fail.

use crate::error::{Error, Result};
use std::{cell::RefCell, fmt, io, sync::Arc};

/// A test's answer to a stage.
type Hook = Box<dyn FnMut(&'static str) -> io::Result<()>>;

/// A test's answer to a read of so many bytes: how many of them are read, or why none.
#[derive(Clone)]
pub(crate) struct ReadHook(Arc<dyn Fn(usize) -> io::Result<usize> + Send + Sync>);

thread_local!(static READ_HOOK: RefCell<Option<ReadHook>> = const { RefCell::new(None) });

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

/// Has files of sources that this thread opens from now on ask `hook` before each read, on whichever thread that is.
pub fn on_read(hook: Option<Arc<dyn Fn(usize) -> io::Result<usize> + Send + Sync>>) {
    READ_HOOK.set(hook.map(ReadHook));
}

/// The hook of files that this thread opens, if a test has set one.
pub(crate) fn read_hook() -> Option<ReadHook> {
    READ_HOOK.with_borrow(Clone::clone)
}

impl ReadHook {
    pub fn bytes(&self, asked: usize) -> io::Result<usize> {
        (self.0)(asked)
    }
}

impl fmt::Debug for ReadHook {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Fn(usize) -> io::Result<usize>")
    }
}
