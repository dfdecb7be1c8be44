//! Products of matrices.

use super::scalar::Scalar;

/// `out = rows * values^T`, row-major, on this thread alone: tiles of rows already run in parallel.
pub(super) fn multiply<S: Scalar>(rows: &[S], values: &[S], d: usize, out: &mut [S]) {
    let (m, width) = (rows.len() / d, values.len() / d);
    assert_eq!(out.len(), m * width);
    // SAFETY: the three slices hold m x d, width x d and m x width elements with the strides given, and `out` is
    // borrowed mutably, so it overlaps neither operand.
    unsafe {
        gemm::gemm(
            m,
            width,
            d,
            out.as_mut_ptr(),
            1,
            width as isize,
            false,
            rows.as_ptr(),
            1,
            d as isize,
            values.as_ptr(),
            d as isize,
            1,
            S::of(0.0),
            S::of(1.0),
            false,
            false,
            false,
            gemm::Parallelism::None,
        );
    }
}
