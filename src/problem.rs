//! The border: what the sizes, types and devices of a call have to be.

use crate::{
    error::{kept, Error, Result},
    metric::Metric,
    operand::Readable,
};
use candle_core::{DType, Device, Storage, Tensor};

/// Rows a single problem may hold: labels and positions are u32.
pub(crate) const MAX_ROWS: usize = u32::MAX as usize;

/// Elements that leave room for every size that is computed from them, in bytes.
const MAX_ELEMENTS: usize = isize::MAX as usize / 64;

/// The sizes of a call, checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Problem {
    /// Leading dimensions of the input; empty for a single problem.
    pub batch: Vec<usize>,
    /// Number of problems: the product of `batch`.
    pub b: usize,
    /// The number of the first of them in the batch that the caller has, where others have the rest of it.
    pub first_problem: usize,
    /// Rows of each problem.
    pub n: usize,
    /// Columns.
    pub d: usize,
    /// Centroids of each problem.
    pub k: usize,
    /// Type of the stored rows and centroids.
    pub dtype: DType,
    /// The metric.
    pub metric: Metric,
}

impl Problem {
    /// Checks the rows of a fit with `k` clusters.
    pub(crate) fn fit(x: &Tensor, k: usize, metric: Metric) -> Result<Self> {
        Self::of(x.dims(), x.dtype(), k, metric)?.fitting()
    }

    /// Checks that there are rows for all clusters.
    pub(crate) fn fitting(self) -> Result<Self> {
        if self.k == 0 || self.k > self.n {
            return Err(Error::Range { argument: "k", got: self.k, min: 1, max: self.n });
        }
        if self.b == 0 {
            return Err(Error::Range { argument: "x batch", got: 0, min: 1, max: usize::MAX });
        }
        Ok(self)
    }

    /// Checks rows against centroids of shape `(..batch, k, d)` or `(k, d)`. What does not fit is wrong of the centroids.
    pub(crate) fn assign(x: &impl Readable, c: &impl Readable, metric: Metric) -> Result<Self> {
        check_rank("centroids", c, 2)?;
        let k = c.dims()[c.dims().len() - 2];
        let p = Self::of(x.dims(), x.dtype(), k, metric)?;
        p.centroids(c, &x.device())?;
        Ok(p)
    }

    /// The same where the centroids are those of a model: what does not fit is wrong of the rows.
    pub(crate) fn predict(x: &Tensor, c: &Tensor, metric: Metric) -> Result<Self> {
        let p = Self::predict_rows(x.dims(), x.dtype(), c, metric)?;
        check_device("x", x, c.device())?;
        Ok(p)
    }

    /// The same for rows of this shape and type that are to be where the centroids are.
    pub(crate) fn predict_rows(dims: &[usize], dtype: DType, c: &Tensor, metric: Metric) -> Result<Self> {
        check_rank("centroids", c, 2)?;
        check_float("centroids", c)?;
        let (batch, k, d) = (&c.dims()[..c.rank() - 2], c.dims()[c.rank() - 2], c.dims()[c.rank() - 1]);
        let p = Self::of(dims, dtype, k, metric)?;
        if dtype != c.dtype() {
            let expected = format!("{:?}, as the centroids", c.dtype());
            return Err(Error::DType { argument: "x", got: dtype, expected });
        }
        if p.d != d {
            let what = "number of columns for these centroids";
            return Err(Error::Size { argument: "x", what, got: p.d, expected: d });
        }
        if !batch.is_empty() && batch != p.batch {
            let expected = [batch, &[p.n, d]].concat();
            return Err(Error::Shape { argument: "x", got: dims.to_vec(), expected });
        }
        p.centroids(c, c.device())?;
        Ok(p)
    }

    /// Checks centroids of shape `(..batch, k, d)` or `(k, d)`.
    pub(crate) fn centroids(&self, c: &impl Readable, device: &Device) -> Result<()> {
        check_rank("centroids", c, 2)?;
        check_dtype("centroids", c, self.dtype)?;
        check_device("centroids", c, device)?;
        let columns = c.dims()[c.dims().len() - 1];
        if columns != self.d {
            return Err(Error::Size { argument: "centroids", what: "columns", got: columns, expected: self.d });
        }
        let k = c.dims()[c.dims().len() - 2];
        if c.dims().len() > 2 && c.dims()[..c.dims().len() - 2] != self.batch[..] {
            let expected = [&self.batch[..], &[k, self.d]].concat();
            return Err(Error::Shape { argument: "centroids", got: c.dims().to_vec(), expected });
        }
        if k == 0 {
            return Err(Error::Range { argument: "k", got: k, min: 1, max: MAX_ROWS });
        }
        Ok(())
    }

    /// Checks rows that are to be grouped by `k` labels.
    pub(crate) fn rows(x: &impl Readable, k: usize) -> Result<Self> {
        Self::of(x.dims(), x.dtype(), k, Metric::default())
    }

    /// Checks rows of a shape and type.
    pub(crate) fn of(dims: &[usize], dtype: DType, k: usize, metric: Metric) -> Result<Self> {
        if dims.len() < 2 {
            return Err(Error::Rank { argument: "x", expected: 2, shape: dims.to_vec() });
        }
        if !matches!(dtype, DType::F16 | DType::BF16 | DType::F32 | DType::F64) {
            return Err(Error::DType { argument: "x", got: dtype, expected: "F16, BF16, F32 or F64".into() });
        }
        let (batch, rows) = dims.split_at(dims.len() - 2);
        let (n, d) = (rows[0], rows[1]);
        if d == 0 {
            return Err(Error::Range { argument: "x columns", got: 0, min: 1, max: usize::MAX });
        }
        for (argument, got) in [("x rows", n), ("k", k)] {
            if got > MAX_ROWS {
                return Err(Error::TooLarge { argument, got, limit: MAX_ROWS });
            }
        }
        let b = product(batch);
        check_elements("x elements", &[b])?;
        check_elements("x elements", &[b, n.max(k), d])?;
        Ok(Self { batch: batch.to_vec(), b, first_problem: 0, n, d, k, dtype, metric })
    }

    /// `(..batch, tail..)`.
    pub(crate) fn shape(&self, tail: &[usize]) -> Vec<usize> {
        [&self.batch[..], tail].concat()
    }

    /// Checks per-row weights of shape `(..batch, n)` or `(n)`.
    pub(crate) fn weights(&self, w: &Tensor, device: &Device) -> Result<()> {
        check_device("sample_weights", w, device)?;
        if !w.dtype().is_float() {
            return Err(Error::DType { argument: "sample_weights", got: w.dtype(), expected: "a float type".into() });
        }
        let expected = self.shape(&[self.n]);
        if w.dims() != expected && w.dims() != [self.n] {
            return Err(Error::Shape { argument: "sample_weights", got: w.dims().to_vec(), expected });
        }
        Ok(())
    }

    /// Checks that there is a number of rows that count for each problem, `(..batch)`.
    pub(crate) fn lengths(&self, lengths: &Tensor, device: &Device) -> Result<()> {
        check_device("lengths", lengths, device)?;
        check_dtype("lengths", lengths, DType::U32)?;
        if lengths.dims() != self.batch {
            return Err(Error::Shape {
                argument: "lengths",
                got: lengths.dims().to_vec(),
                expected: self.batch.clone(),
            });
        }
        Ok(())
    }

    /// Reads the numbers of rows that count, and checks that they are enough for all clusters and no more than there are.
    pub(crate) fn read_lengths(&self, lengths: &Tensor) -> Result<Vec<usize>> {
        let lengths: Vec<_> = lengths.flatten_all()?.to_vec1::<u32>()?.into_iter().map(|l| l as usize).collect();
        match lengths.iter().enumerate().find(|(_, l)| !(self.k..=self.n).contains(l)) {
            Some((batch, &got)) => {
                let named = || kept(format!("batch element {}: lengths", self.first_problem + batch));
                let argument = if self.batch.is_empty() { "lengths" } else { named() };
                Err(Error::Range { argument, got, min: self.k, max: self.n })
            }
            None => Ok(lengths),
        }
    }
}

/// Checks labels of shape `(..batch, n)`, and counts problems and rows: `(b, n)`.
pub(crate) fn labels(labels: &impl Readable, k: usize) -> Result<(usize, usize)> {
    if labels.dims().is_empty() {
        return Err(Error::Rank { argument: "labels", expected: 1, shape: vec![] });
    }
    if labels.dtype() != DType::U32 {
        return Err(Error::DType { argument: "labels", got: labels.dtype(), expected: "U32".into() });
    }
    if k == 0 || k > MAX_ROWS {
        return Err(Error::Range { argument: "k", got: k, min: 1, max: MAX_ROWS });
    }
    let n = labels.dims()[labels.dims().len() - 1];
    if n > MAX_ROWS {
        return Err(Error::TooLarge { argument: "labels", got: n, limit: MAX_ROWS });
    }
    let b = product(&labels.dims()[..labels.dims().len() - 1]);
    check_elements("labels", &[b, n.max(k)])?;
    Ok((b, n))
}

/// A tensor of no elements that lies at the beginning of its storage: a view of another may begin beyond the end of its own, and
/// Candle cannot allocate none on a GPU.
pub(crate) fn empty(dims: &[usize], dtype: DType, device: &Device) -> Result<Tensor> {
    let stored: Vec<_> = dims.iter().map(|&size| size.max(1)).collect();
    let mut t = Tensor::zeros(1, dtype, device)?.broadcast_as(stored)?;
    for (dim, _) in dims.iter().enumerate().filter(|(_, size)| **size == 0) {
        t = t.narrow(dim, 0, 0)?;
    }
    Ok(t)
}

/// The product of sizes, `usize::MAX` if it is larger.
pub(crate) fn product(sizes: &[usize]) -> usize {
    sizes.iter().fold(1, |p: usize, &s| p.saturating_mul(s))
}

/// Checks that a tensor of so many elements can be computed with.
pub(crate) fn check_elements(argument: &'static str, sizes: &[usize]) -> Result<()> {
    match product(sizes) {
        got if got > MAX_ELEMENTS => Err(Error::TooLarge { argument, got, limit: MAX_ELEMENTS }),
        _ => Ok(()),
    }
}

pub(crate) fn check_rank(argument: &'static str, t: &impl Readable, expected: usize) -> Result<()> {
    if t.dims().len() < expected {
        return Err(Error::Rank { argument, expected, shape: t.dims().to_vec() });
    }
    Ok(())
}

pub(crate) fn check_float(argument: &'static str, t: &impl Readable) -> Result<()> {
    if !matches!(t.dtype(), DType::F16 | DType::BF16 | DType::F32 | DType::F64) {
        return Err(Error::DType { argument, got: t.dtype(), expected: "F16, BF16, F32 or F64".into() });
    }
    Ok(())
}

pub(crate) fn check_dtype(argument: &'static str, t: &impl Readable, expected: DType) -> Result<()> {
    if t.dtype() != expected {
        return Err(Error::DType { argument, got: t.dtype(), expected: format!("{expected:?}") });
    }
    Ok(())
}

pub(crate) fn check_device(argument: &'static str, t: &impl Readable, expected: &Device) -> Result<()> {
    if !t.device().same_device(expected) {
        let (got, expected) = (format!("{:?}", t.device().location()), format!("{:?}", expected.location()));
        return Err(Error::Device { argument, got, expected });
    }
    Ok(())
}

/// Whether what is written to one tensor may be seen in the other.
pub(crate) fn share_storage(a: &Tensor, b: &Tensor) -> bool {
    // One lock at a time: a second one on the same storage could wait for a writer that waits for the first.
    let address = |t: &Tensor| std::ptr::from_ref::<Storage>(&t.storage_and_layout().0) as usize;
    address(a) == address(b)
}
