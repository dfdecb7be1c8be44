//! A gradient that turns with what it passes.

use super::quantizer::wide;
use crate::{
    error::{Error, Result},
    functional, primitives,
    problem::{check_device, check_dtype},
};
use candle_core::{Tensor, D};

/// `values` in the place of `x`, both `(.., d)`, with the gradient of the rotation trick (Fifty et al. 2024, "Restructuring vector quantization
/// with the rotation trick"): that of the rotation and the factor that take a row to its value, which count as constants. A gradient keeps
/// its angle to the value as one to the row.
///
/// With the unit vectors `u` of a row, `v` of its value and `w` of `u + v`, a row `e` becomes `|value| / |row| (e - 2 w (w.e) + 2 v (u.e))`. Where
/// either has no direction, the gradient passes unchanged. It goes with any quantiser: `rotate_to(&x, &codebook.forward(&x)?)`.
///
/// # Errors
/// Refuses shapes, dtypes and devices that differ, and on a GPU more values than Candle's kernels count.
pub fn rotate_to(x: &Tensor, values: &Tensor) -> Result<Tensor> {
    if x.dims() != values.dims() || x.rank() == 0 {
        return Err(Error::Shape { argument: "values", got: values.dims().to_vec(), expected: x.dims().to_vec() });
    }
    check_dtype("values", values, x.dtype())?;
    check_device("values", values, x.device())?;
    primitives::check_counted("x", x)?;
    let values = values.detach();
    if !x.track_op() || x.elem_count() == 0 {
        return Ok(values);
    }
    let wide = wide(x.dtype());
    let (rows, target) = (x.to_dtype(wide)?, values.to_dtype(wide)?);
    let (u, row_norm) = direction(&rows.detach())?;
    let (v, norm) = direction(&target)?;
    let (w, _) = direction(&(&u + &v)?)?;
    let along = |t: &Tensor| (&rows * t)?.sum_keepdim(D::Minus1);
    let turned = ((&rows - (w.broadcast_mul(&along(&w)?)? * 2.0)?)? + (v.broadcast_mul(&along(&u)?)? * 2.0)?)?;
    let known = (row_norm.gt(0.0)? * norm.gt(0.0)?)?;
    let factor = known.where_cond(&(norm / &row_norm)?, &row_norm.ones_like()?)?;
    let known = known.broadcast_as(rows.shape())?;
    let turned = known.where_cond(&turned.broadcast_mul(&factor)?, &rows)?;
    functional::straight_through(&turned.to_dtype(x.dtype())?, values)
}

/// Rows as unit vectors, zeros where they have no direction, and their norms `(.., 1)`.
fn direction(rows: &Tensor) -> Result<(Tensor, Tensor)> {
    let norms = rows.sqr()?.sum_keepdim(D::Minus1)?.sqrt()?;
    let divisors = norms.gt(0.0)?.where_cond(&norms, &norms.ones_like()?)?;
    Ok((rows.broadcast_div(&divisors)?, norms))
}
