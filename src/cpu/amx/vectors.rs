//! The loops by AVX-512 over what the matrix unit has multiplied.

use super::super::lines::{PAIR, TILE};
use std::arch::x86_64::*;

#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn lowest(scores: &[f32]) -> f32 {
    let mut least = [_mm512_set1_ps(f32::INFINITY); 2];
    let (pairs, tile) = scores.as_chunks::<PAIR>();
    for pair in pairs {
        for (least, tile) in least.iter_mut().zip(pair.as_chunks::<16>().0) {
            *least = _mm512_min_ps(load(tile), *least);
        }
    }
    if let Some(tile) = tile.first_chunk() {
        least[0] = _mm512_min_ps(load(tile), least[0]);
    }
    _mm512_reduce_min_ps(_mm512_min_ps(least[0], least[1]))
}

#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn all_at_most(scores: &[f32], cut: f32, mut keep: impl FnMut(usize, f32) -> bool) -> bool {
    let cut = _mm512_set1_ps(cut);
    for (i, pair) in scores.as_chunks::<PAIR>().0.iter().enumerate() {
        let [low, high] = [&pair[..16], &pair[16..]].map(|tile| {
            let tile = tile.first_chunk().expect("a tile has sixteen columns");
            u32::from(_mm512_cmp_ps_mask::<_CMP_LE_OQ>(load(tile), cut))
        });
        let mut kept = low | high << 16;
        while kept != 0 {
            let column = kept.trailing_zeros() as usize;
            if !keep(i * PAIR + column, pair[column]) {
                return false;
            }
            kept &= kept - 1;
        }
    }
    true
}

#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn only_at_most(scores: &[f32], cut: f32) -> Option<usize> {
    let (cut, mut count, mut at) = (_mm512_set1_ps(cut), 0, 0);
    for (i, tile) in scores.as_chunks::<TILE>().0.iter().enumerate() {
        let kept = u32::from(_mm512_cmp_ps_mask::<_CMP_LE_OQ>(load(tile), cut));
        count += kept.count_ones();
        at = if kept == 0 { at } else { i * TILE + kept.trailing_zeros() as usize };
    }
    (count == 1).then_some(at)
}

#[inline]
#[target_feature(enable = "avx512f")]
fn load(tile: &[f32; 16]) -> __m512 {
    // SAFETY: these are 64 bytes, and the load asks for no alignment.
    unsafe { _mm512_loadu_ps(tile.as_ptr()) }
}
