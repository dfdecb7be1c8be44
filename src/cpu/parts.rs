//! The parts of problems that tasks read, and what becomes of a head's parts.

use super::{
    lanes::Lane,
    scalar::Scalar,
    softmax::{join, state_len},
    tensors::{tensor, Element},
};
use crate::{error::Result, host};
use candle_core::{Shape, Tensor};
use std::ops::Range;

/// `problems` of `group` query heads, whose values have `width` columns.
#[derive(Clone, Copy)]
pub(super) struct Heads {
    pub(super) problems: usize,
    pub(super) group: usize,
    pub(super) width: usize,
}

/// The attention of all heads, `(problems, group, width)`: a task reads each of `parts` of each problem, some `steps`, for a range of its
/// heads, and writes the states of these. Parts do not depend on the number of threads, and neither do the bits of what they join to.
pub(super) fn attend_parts<E: Lane, P: Clone + Send + Sync, S: Send>(
    op: &'static str,
    Heads { problems, group, width }: Heads,
    parts: &[(P, Range<usize>)],
    steps: usize,
    scratch: impl Fn() -> S + Send + Sync,
    read: impl Fn(&mut S, usize, P, Range<usize>, &mut [E]) + Send + Sync,
) -> Result<Vec<E>> {
    let state = state_len(width);
    // The states of a problem, in the order of the parts.
    let len = parts.iter().map(|(_, heads)| heads.len() * state).sum::<usize>();
    let mut states = host::filled(op, problems * len, E::of(0.0))?;
    let tasks = states.chunks_mut(len).enumerate().flat_map(|(p, mut states)| {
        let task = |(part, heads): &(P, Range<usize>)| {
            let (mine, rest) = std::mem::take(&mut states).split_at_mut(heads.len() * state);
            states = rest;
            (p, part.clone(), heads.clone(), mine)
        };
        parts.iter().map(task).collect::<Vec<_>>()
    });
    host::for_each(tasks.collect(), steps, scratch, |scratch, (p, part, heads, state)| {
        read(scratch, p, part, heads, state);
        Ok(())
    })?;

    let mut out = host::filled(op, problems * group * width, E::of(0.0))?;
    let heads = out.chunks_mut(width).enumerate().collect();
    let join = |_: &mut (), (i, out): (usize, &mut [E])| {
        let (states, head) = (&states[i / group * len..][..len], i % group);
        let mut at = 0usize;
        let states = parts.iter().filter_map(|(_, heads)| {
            let start = at.wrapping_add(head.wrapping_sub(heads.start).wrapping_mul(state));
            at += heads.len() * state;
            heads.contains(&head).then(|| &states[start..start + state])
        });
        join(states.collect::<Vec<_>>().iter().copied(), out);
        Ok(())
    };
    host::for_each(heads, parts.len() * width / 4, || (), join)?;
    Ok(out)
}

/// A contiguous result of a type that is stored.
pub(super) fn narrowed<T: Element>(op: &'static str, of: Vec<T::Filter>, shape: impl Into<Shape>) -> Result<Tensor> {
    let mut out = host::buffer(op, of.len())?;
    out.extend(of.iter().map(|v| T::narrow(v.widen())));
    tensor(out, shape)
}
