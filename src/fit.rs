//! The result of a fit.

use crate::{
    error::{Error, Result},
    functional, host,
    metric::Metric,
    ops::labels::{check_labels, flat_labels},
    primitives,
    problem::{self, Problem},
    rows::Rows,
    saved::{self, Saved},
};
use candle_core::{DType, Device, Tensor};
use std::{fmt, path::Path};

/// A finished fit. All tensors are on the input's device and start with its batch dimensions.
///
/// Its fields can be replaced: what does not belong together any more is refused where it is used, with [`Error`].
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Fit {
    /// `(..batch, k, d)` in the input's dtype.
    pub centroids: Tensor,
    /// u32 `(..batch, n)`: equal to `predict(x)`, wherever the fit ended. Rows that `predict` refuses, because they are not
    /// finite (padding, or unchecked ones), have a label below `k` that means nothing.
    pub labels: Tensor,
    /// Rows in each cluster, u32 `(..batch, k)`.
    pub counts: Tensor,
    /// The sample weights of the rows in each cluster, f64 `(..batch, k)`, if the fit had any.
    pub weights: Option<Tensor>,
    /// Weighted sum of the distances to the assigned centroids in the metric's own unit, f64 `(..batch)`, computed from
    /// differences and summed in no particular order to the same bits in any.
    pub inertia: Tensor,
    /// Centroid updates made, u32 `(..batch)`. As in scikit-learn, the last one of a problem that converged strictly is the one
    /// that moved nothing.
    pub n_iter: Tensor,
    /// 1 where the problem converged before `max_iters` or [`on_iteration`](crate::KMeans::on_iteration) ended the fit, u8
    /// `(..batch)`.
    pub converged: Tensor,
    /// The metric of the fit.
    pub metric: Metric,
}

impl Fit {
    /// Exact labels of new rows `(..batch, m, d)`, u32 `(..batch, m)`. A fit of one problem labels any batch.
    ///
    /// # Errors
    /// Refuses rows that do not fit the centroids, and non-finite ones (the host waits for that answer; the op
    /// [`assign`](crate::assign) does not ask).
    pub fn predict(&self, x: &Tensor) -> Result<Tensor> {
        Problem::predict(x, &self.centroids, self.metric)?;
        refuse_non_finite("x", &primitives::max_abs_and_first_nonfinite(&Rows::new(x)?)?.1)?;
        functional::assign(x, &self.centroids, self.metric)
    }

    /// The distance of each row of `x` `(..batch, m, d)` to every centroid, in the metric's own unit (squared for squared
    /// Euclidean): `(..batch, m, k)`, f64 for f64 rows and f32 otherwise.
    ///
    /// # Errors
    /// As [`predict`](Self::predict). Refuses more distances than a tensor holds.
    pub fn transform(&self, x: &Tensor) -> Result<Tensor> {
        let p = Problem::predict(x, &self.centroids, self.metric)?;
        problem::check_elements("x rows times centroids", &[p.b, p.n, p.k])?;
        let x = Rows::new(x)?;
        refuse_non_finite("x", &primitives::max_abs_and_first_nonfinite(&x)?.1)?;
        let c = Rows::new(&self.centroids)?.broadcast(p.b);
        Ok(primitives::pairwise(&x, &c, self.metric)?.reshape(p.shape(&[p.n, p.k]))?)
    }

    /// Writes the fit as a safetensors file, whole or not at all: a temporary file is renamed to `path`, or to what `path` links
    /// to. The same fit gives the same bytes.
    ///
    /// # Errors
    /// [`Error::Io`] if it cannot be written. Refuses a fit that [`KMeans::load`](crate::KMeans::load) would: fields that do not
    /// belong together, and centroids that are not finite.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        self.check()?;
        let fit = self.to_device(&Device::Cpu)?;
        fit.check()?;
        if let Some(with) = fit.fault()? {
            return Err(Error::Conflict { argument: "fit", got: "a file".into(), with });
        }
        let tensors = self.named().into_iter().map(|(name, t)| (name.to_string(), t));
        saved::write(path.as_ref(), tensors, [("metric".to_string(), self.metric.name().to_string())])
    }

    pub(crate) fn load(path: &Path, device: &Device) -> Result<Self> {
        let mut file = Saved::read(path, device)?;
        let metric = file.metric("metric")?;
        let mut take = |name| file.on_host(name);
        let fit = Self {
            centroids: take("centroids")?,
            labels: take("labels")?,
            counts: take("counts")?,
            weights: None,
            inertia: take("inertia")?,
            n_iter: take("n_iter")?,
            converged: take("converged")?,
            metric,
        };
        let fit = Self { weights: file.holds("weights").then(|| file.on_host("weights")).transpose()?, ..fit };
        let checked = fit.check().and_then(|()| fit.fault());
        match checked.map_err(|e| file.bad(e.to_string()))? {
            Some(fault) => Err(file.bad(fault)),
            None => fit.to_device(device),
        }
    }

    /// The tensors, weights last.
    fn named(&self) -> Vec<(&'static str, &Tensor)> {
        let always = [
            ("centroids", &self.centroids),
            ("labels", &self.labels),
            ("counts", &self.counts),
            ("inertia", &self.inertia),
            ("n_iter", &self.n_iter),
            ("converged", &self.converged),
        ];
        always.into_iter().chain(self.weights.as_ref().map(|weights| ("weights", weights))).collect()
    }

    /// The same in other tensors.
    fn map(&self, mut f: impl FnMut(&Tensor) -> Result<Tensor>) -> Result<Self> {
        Ok(Self {
            centroids: f(&self.centroids)?,
            labels: f(&self.labels)?,
            counts: f(&self.counts)?,
            inertia: f(&self.inertia)?,
            n_iter: f(&self.n_iter)?,
            converged: f(&self.converged)?,
            weights: self.weights.as_ref().map(f).transpose()?,
            metric: self.metric,
        })
    }

    /// With these batch dimensions in place of one.
    pub(crate) fn with_batch(&self, batch: &[usize]) -> Result<Self> {
        self.map(|t| Ok(t.reshape([batch, &t.dims()[1..]].concat())?))
    }

    /// The problems of several fits as one batch, of fits with one dimension of batch.
    pub(crate) fn cat(fits: &[Self]) -> Result<Self> {
        let mut fields = (0..).map(|i| fits.iter().map(|fit| fit.named()[i].1).collect::<Vec<_>>());
        fits[0].map(|_| Ok(Tensor::cat(&fields.next().expect("as many fields"), 0)?))
    }

    /// The same on `device`.
    ///
    /// # Errors
    /// Fails where a device does.
    pub fn to_device(&self, device: &Device) -> Result<Self> {
        self.map(|t| Ok(host::to_device(t, device)?))
    }

    /// The number of clusters, of a fit that was [checked](Self::check).
    pub(crate) fn k(&self) -> usize {
        self.centroids.dims()[self.centroids.rank() - 2]
    }

    /// Refuses fields of dtypes, shapes or devices that do not belong together, and labels of no cluster where the host need
    /// not wait to see them. (Where it would, kernels stay in range whatever labels say.)
    pub(crate) fn check(&self) -> Result<()> {
        let c = &self.centroids;
        problem::check_rank("centroids", c, 2)?;
        problem::check_float("centroids", c)?;
        let (batch, [k, d]) = (&c.dims()[..c.rank() - 2], [self.k(), c.dims()[c.rank() - 1]]);
        let problems = problem::product(batch);
        for (argument, got) in [("centroids rows", k), ("centroids columns", d), ("centroids batch", problems)] {
            if got == 0 {
                return Err(Error::Range { argument, got, min: 1, max: usize::MAX });
            }
        }
        problem::check_rank("labels", &self.labels, 1)?;
        let n = self.labels.dims()[self.labels.rank() - 1];
        if k > n || n > problem::MAX_ROWS {
            return Err(Error::Range { argument: "labels", got: n, min: k, max: problem::MAX_ROWS });
        }
        for ((argument, t), (dtype, tail)) in self.named().into_iter().skip(1).zip([
            (DType::U32, &[n][..]),
            (DType::U32, &[k]),
            (DType::F64, &[]),
            (DType::U32, &[]),
            (DType::U8, &[]),
            (DType::F64, &[k]),
        ]) {
            problem::check_dtype(argument, t, dtype)?;
            problem::check_device(argument, t, c.device())?;
            let expected = [batch, tail].concat();
            if t.dims() != expected {
                return Err(Error::Shape { argument, got: t.dims().to_vec(), expected });
            }
        }
        if primitives::reads_are_free(c.device()) {
            check_labels(&flat_labels(&(&self.labels).into(), k)?, k)?;
        }
        Ok(())
    }

    /// Says what is wrong with the values of a [checked](Self::check) fit on the CPU.
    fn fault(&self) -> Result<Option<String>> {
        if !saved::all_finite(&self.centroids)? {
            return Ok(Some("centroids that hold a NaN or an infinity".into()));
        }
        if let Some(weights) = &self.weights {
            let weights = weights.flatten_all()?.to_vec1::<f64>()?;
            if let Some(v) = weights.into_iter().find(|v| !(v.is_finite() && *v >= 0.0)) {
                return Ok(Some(format!("a cluster of weight {v}")));
            }
        }
        let flat = |t: &Tensor| Ok::<_, Error>(t.flatten_all()?.to_vec1::<u32>()?);
        let (labels, counts, n_iter) = (flat(&self.labels)?, flat(&self.counts)?, flat(&self.n_iter)?);
        let converged = self.converged.flatten_all()?.to_vec1::<u8>()?;
        let inertia = self.inertia.flatten_all()?.to_vec1::<f64>()?;
        let k = self.k();
        let problems = labels.chunks(labels.len() / inertia.len()).zip(counts.chunks(k)).enumerate();
        let mut faults = problems.filter_map(|(b, (labels, counts))| {
            // Padding comes last, and is not counted.
            let counted = counts.iter().map(|&c| c as usize).sum::<usize>();
            let mut sizes = vec![0; k];
            labels.iter().take(counted).for_each(|&label| sizes[label as usize] += 1);
            let squares = matches!(self.metric, Metric::SquaredEuclidean | Metric::Manhattan);
            let what = match (converged[b], inertia[b]) {
                _ if counted < k || sizes != counts => "counts that are not those of its labels",
                (2.., _) => "a mark of convergence that is neither 0 nor 1",
                (1, _) if n_iter[b] == 0 => "no iteration that it converged in",
                (_, inertia) if inertia.is_nan() || squares && inertia < 0.0 => "an inertia that no distances have",
                _ => return None,
            };
            Some(format!("batch element {b} with {what}"))
        });
        Ok(faults.next())
    }

    /// `other`'s problems where `mask` (u8 `(..batch)`) is set.
    pub(crate) fn replaced_where(&self, mask: &Tensor, other: &Self) -> Result<Self> {
        let pick = |new: &Tensor, old: &Tensor| {
            let mut shape = mask.dims().to_vec();
            shape.resize(old.rank(), 1);
            Ok::<_, Error>(mask.reshape(shape)?.broadcast_as(old.shape())?.where_cond(new, old)?)
        };
        let mut others = other.named().into_iter().map(|(_, t)| t);
        self.map(|old| pick(others.next().expect("as many fields"), old))
    }
}

/// The sizes of a fit and how it went, for which the host waits.
impl fmt::Display for Fit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let host = self.check().and_then(|()| self.to_device(&Device::Cpu));
        let values = host.and_then(|fit| {
            let u32s = |t: &Tensor| Ok::<_, Error>(t.flatten_all()?.to_vec1::<u32>()?);
            let converged = fit.converged.flatten_all()?.to_vec1::<u8>()?;
            let inertia = fit.inertia.flatten_all()?.to_vec1::<f64>()?;
            Ok((u32s(&fit.counts)?, u32s(&fit.n_iter)?, converged, inertia))
        });
        let (counts, n_iter, converged, inertia) = match values {
            Ok(values) => values,
            Err(error) => return write!(f, "a fit that cannot be read: {error}"),
        };
        let (n, d) = (self.labels.dims()[self.labels.rank() - 1], self.centroids.dims()[self.centroids.rank() - 1]);
        let range = |values: &[u32]| {
            let (least, most) = (values.iter().min().unwrap_or(&0), values.iter().max().unwrap_or(&0));
            if least == most {
                least.to_string()
            } else {
                format!("{least} to {most}")
            }
        };
        if inertia.len() > 1 {
            write!(f, "{} problems of ", inertia.len())?;
        }
        let (k, metric, total) = (self.k(), self.metric.name(), inertia.iter().sum::<f64>());
        write!(f, "{n} rows of {d} columns in {k} clusters of {} by {metric}: ", range(&counts))?;
        match converged.iter().filter(|&&c| c == 1).count() {
            0 => write!(f, "not converged")?,
            all if all == converged.len() => write!(f, "converged")?,
            some => write!(f, "{some} converged")?,
        }
        write!(f, " after {} iterations, inertia {total}", range(&n_iter))
    }
}

/// Reads [`primitives::max_abs_and_first_nonfinite`]'s answer.
pub(crate) fn refuse_non_finite(argument: &'static str, first_nonfinite: &Tensor) -> Result<()> {
    let rows = first_nonfinite.to_vec1::<u32>()?;
    match rows.iter().position(|&r| r != u32::MAX) {
        Some(batch) => Err(Error::NonFinite { argument, batch, row: rows[batch] as usize }),
        None => Ok(()),
    }
}
