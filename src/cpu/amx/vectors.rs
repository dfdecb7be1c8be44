//! The loops by AVX-512 over what the matrix unit has multiplied.

use super::super::lines::{Ends, TileEnds, BYTE_TILE, PAIR, SLICES, TILE};
use std::arch::x86_64::*;

/// Numbers of f64 in a vector.
const HALF: usize = BYTE_TILE / 2;

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

#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn distances(
    levels: &[i32],
    (rows, centroids): (&[Ends], &TileEnds),
    (out, stride): (&mut [f32], usize),
    mut open: impl FnMut(usize, u32),
) {
    let of_level = BYTE_TILE * BYTE_TILE;
    assert!(levels.len() == SLICES * of_level && rows.len() <= BYTE_TILE && stride >= BYTE_TILE);
    let lows = halves(&centroids.low);
    let highs = halves(&centroids.high);
    let factors = halves(&centroids.factor);
    let shift = _mm512_set1_pd(1.0 / 256.0);
    for (i, (row, out)) in rows.iter().zip(out.chunks_mut(stride)).enumerate() {
        let (low, high, factor) = (_mm512_set1_pd(row.low), _mm512_set1_pd(row.high), _mm512_set1_pd(row.factor));
        let (mut below, mut above) = ([_mm256_setzero_ps(); 2], [_mm256_setzero_ps(); 2]);
        for half in 0..2 {
            let level = |level: usize| {
                let at = level * of_level + i * BYTE_TILE + half * HALF;
                let level: &[i32; HALF] = levels[at..].first_chunk().expect("there are rows of all levels");
                // SAFETY: these are 32 bytes, and the load asks for no alignment.
                _mm512_cvtepi32_pd(unsafe { _mm256_loadu_si256(level.as_ptr().cast()) })
            };
            let mut product = level(SLICES - 1);
            for next in (0..SLICES - 1).rev() {
                product = _mm512_fmadd_pd(product, shift, level(next));
            }
            let product = _mm512_mul_pd(product, factor);
            let from = |sum| _mm512_cvtpd_ps(_mm512_fnmadd_pd(product, factors[half], sum));
            below[half] = from(_mm512_add_pd(low, lows[half]));
            above[half] = from(_mm512_add_pd(high, highs[half]));
        }
        let (below, above) = (joined(below), joined(above));
        let out: &mut [f32; BYTE_TILE] = out.first_chunk_mut().expect("room for a row of the tile");
        // SAFETY: these are 64 bytes, and the store asks for no alignment.
        unsafe { _mm512_storeu_ps(out.as_mut_ptr(), _mm512_castpd_ps(below)) };
        let differ = _mm512_cmpneq_epi32_mask(_mm512_castpd_si512(below), _mm512_castpd_si512(above));
        if differ != 0 {
            open(i, u32::from(differ));
        }
    }
}

/// The vectors of a tile's numbers.
#[inline]
#[target_feature(enable = "avx512f")]
fn halves(of: &[f64; BYTE_TILE]) -> [__m512d; 2] {
    // SAFETY: each half is 64 bytes, and the loads ask for no alignment.
    unsafe { [_mm512_loadu_pd(of.as_ptr()), _mm512_loadu_pd(of[HALF..].as_ptr())] }
}

/// Both halves of a tile's numbers in a vector.
#[inline]
#[target_feature(enable = "avx512f")]
fn joined([left, right]: [__m256; 2]) -> __m512d {
    _mm512_insertf64x4::<1>(_mm512_castpd256_pd512(_mm256_castps_pd(left)), _mm256_castps_pd(right))
}
