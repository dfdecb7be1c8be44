//! Matrices from NumPy's files.

use anyhow::{bail, ensure, Context, Result};
use candle_core::{Device, Tensor, WithDType};
use npyz::{NpyFile, Order};
use std::{fs::File, io, path::Path};

/// The rows of a `.npy` file, `(..batch, n, d)` in C order: floats of 2, 4 or 8 bytes, u8, u32, i16, i32 or i64, in either byte
/// order. One dimension becomes one column. Arrays in Fortran order, which `numpy.save` writes for a transposed matrix and
/// `Tensor::read_npy` refuses, are transposed.
pub fn read(path: &Path) -> Result<Tensor> {
    let file = File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
    rows(io::BufReader::new(file)).with_context(|| format!("cannot read {}", path.display()))
}

fn rows(file: impl io::Read) -> Result<Tensor> {
    let npy = NpyFile::new(file)?;
    let shape = npy.shape().iter().map(|&size| usize::try_from(size)).collect::<Result<Vec<_>, _>>()?;
    let elements = shape.iter().try_fold(1usize, |elements, &size| elements.checked_mul(size));
    ensure!(elements.is_some(), "an array of shape {shape:?} has too many elements");
    let array = match npy.order() {
        Order::C => elements_of(npy, &shape)?,
        // The first index runs fastest, as the last one does in C order.
        Order::Fortran => {
            let reversed: Vec<usize> = shape.iter().rev().copied().collect();
            let axes: Vec<usize> = (0..shape.len()).rev().collect();
            elements_of(npy, &reversed)?.permute(axes)?.contiguous()?
        }
    };
    match shape.len() {
        0 => bail!("the array has no dimensions, and rows need at least one"),
        1 => Ok(array.unsqueeze(1)?),
        _ => Ok(array),
    }
}

/// The elements as they are stored, of the first type that fits them.
fn elements_of<R: io::Read>(npy: NpyFile<R>, shape: &[usize]) -> Result<Tensor> {
    fn tensor<T: WithDType>(elements: impl Iterator<Item = io::Result<T>>, shape: &[usize]) -> Result<Tensor> {
        let elements = elements.collect::<io::Result<Vec<_>>>()?;
        Ok(Tensor::from_vec(elements, shape, &Device::Cpu)?)
    }
    macro_rules! of_the_type_in {
        ($npy:ident: $($element:ty)*) => {{
            $(let $npy = match $npy.try_data::<$element>() {
                Ok(elements) => return tensor(elements, shape),
                Err(npy) => npy,
            };)*
            bail!("elements are {}, not floats of 2, 4 or 8 bytes, u8, u32, i16, i32 or i64", $npy.dtype().descr())
        }};
    }
    of_the_type_in!(npy: f32 f64 half::f16 u8 u32 i16 i32 i64)
}
