//! Linear layers whose weights are codes of a few bits, and run as codes.

use crate::{
    error::{Error, Result},
    host, primitives, problem,
    request::{LutMatrix, Outliers},
    rows::Rows,
    saved::{all_finite, Saved},
};
use candle_core::{DType, Device, Tensor};
pub use config::{Granularity, LutConfig};
use half::f16;
use hessian::Hessian;
pub use linear::LutLinear;

mod config;
mod fit;
mod hessian;
mod linear;
mod pack;

/// Weights that become numbers at a time where there is no kernel for codes.
const DECODED: usize = 1 << 24;

/// The weights of a linear layer as codes of 2, 3 or 4 bits, each of which names one of the output's own levels: non-uniform
/// quantisation, as in SqueezeLLM (Kim et al. 2023), with levels that are a global optimum.
///
/// A weight is its level times the scale of its group, an f16 that is the largest magnitude there. The levels, f16, are the centroids of
/// [`Init::Optimal`](crate::Init::Optimal) of the scaled weights. An error counts by the square of the scale and, if it is given, by the
/// importance of the column: the mean square of what it is multiplied by in a calibration, which is the diagonal of the Hessian of
/// the layer's squared error. In further rounds each scale is the one that is best for its codes, by least squares, and levels and codes
/// follow. Levels that all outputs share are an optimum of a histogram of 16,384 bins. Outliers are the weights of each output whose squares count most; what they are more than
/// their levels is kept beside the codes, in f16, with their columns.
#[derive(Clone, Debug)]
pub struct LutWeights {
    config: LutConfig,
    inputs: usize,
    /// As [`LutMatrix`] has them.
    codes: Tensor,
    levels: Tensor,
    scales: Tensor,
    /// Columns and values.
    outliers: Option<(Tensor, Tensor)>,
}

impl LutWeights {
    /// Quantises `weight` `(outputs, inputs)`, on the host. `importance` is `(inputs)`, or `(outputs, inputs)`; what is not a finite number
    /// above 0 is none.
    ///
    /// # Errors
    /// Refuses other shapes and dtypes, settings out of range, weights that are not finite, and those beyond an f16, 65504.
    pub fn quantize(weight: &Tensor, importance: Option<&Tensor>, config: &LutConfig) -> Result<Self> {
        let [outputs, inputs] = dims2_float("weight", weight)?;
        config.check(inputs)?;
        if let Some(importance) = importance {
            let dims = importance.dims();
            if dims != [inputs] && dims != [outputs, inputs] {
                return Err(Error::Shape { argument: "importance", got: dims.to_vec(), expected: vec![inputs] });
            }
            check_float("importance", importance)?;
        }
        let weights = checked_weights(weight, inputs)?;
        let mut importance = importance.map(on_host).transpose()?;
        let counts = |v: &f32| *v > 0.0 && v.is_finite();
        importance.iter_mut().flatten().filter(|v| !counts(v)).for_each(|v| *v = 0.0);
        Self::of(fit::fit(&weights, importance.as_deref(), None, inputs, config)?, weight, config)
    }

    /// Quantises `weight` `(outputs, inputs)`, on the host, so that what the layer puts out is off by little, rather than each weight.
    /// `hessian` `(inputs, inputs)` is `X^T X` of rows `X` that the layer reads in a calibration, times any factor; of it the lower triangle is
    /// read, with a hundredth of the mean of the diagonal added to the diagonal. Outliers, scales and levels start from
    /// [`quantize`](Self::quantize) with the diagonal as importance. Then codes make up for each other's errors (GPTQ, Frantar et al.
    /// 2022), and in each of the rounds of `config` levels, unless all outputs share them, scales and codes are fitted to each other by
    /// the same square. The time grows with `outputs * inputs^2`.
    ///
    /// ```
    /// use candle_core::{Device, Tensor};
    /// use candle_flash_kmeans::nn::{LutConfig, LutWeights};
    ///
    /// let uniform = |rows, columns| Tensor::rand(-1f32, 1f32, (rows, columns), &Device::Cpu);
    /// let x = uniform(64, 4)?.matmul(&uniform(4, 32)?)?; // 32 columns that say what 4 could say
    /// let weight = uniform(8, 32)?;
    /// let config = LutConfig { bits: 2, ..LutConfig::default() };
    /// let off = |w: LutWeights| (w.matmul(&x)? - x.matmul(&weight.t()?)?)?.sqr()?.sum_all()?.to_scalar::<f32>();
    /// let calibrated = LutWeights::quantize_calibrated(&weight, &x.t()?.matmul(&x)?, &config)?;
    /// assert!(off(calibrated)? < off(LutWeights::quantize(&weight, None, &config)?)?);
    /// # Ok::<_, candle_flash_kmeans::Error>(())
    /// ```
    ///
    /// # Errors
    /// As [`quantize`](Self::quantize), and refuses a Hessian that is not finite, or that no rows can have.
    pub fn quantize_calibrated(weight: &Tensor, hessian: &Tensor, config: &LutConfig) -> Result<Self> {
        let [_, inputs] = dims2_float("weight", weight)?;
        config.check(inputs)?;
        check_float("hessian", hessian)?;
        if hessian.dims() != [inputs, inputs] {
            let expected = vec![inputs, inputs];
            return Err(Error::Shape { argument: "hessian", got: hessian.dims().to_vec(), expected });
        }
        let weights = checked_weights(weight, inputs)?;
        let hessian = Hessian::new(finite("hessian", hessian, inputs)?, inputs)?;
        let stored = fit::fit(&weights, Some(&hessian.diagonal()), Some(&hessian), inputs, config)?;
        Self::of(stored, weight, config)
    }

    /// What is stored of `weight`, as tensors on its device.
    fn of(stored: fit::Stored, weight: &Tensor, config: &LutConfig) -> Result<Self> {
        let ((outputs, inputs), device) = (weight.dims2()?, weight.device());
        let (group, columns) = config.columns(inputs);
        let outliers = match config.outliers {
            0 => None,
            each => Some((
                Tensor::from_vec(stored.outlier_columns, (outputs, each), device)?,
                Tensor::from_vec(stored.outlier_values, (outputs, each), device)?,
            )),
        };
        Ok(Self {
            config: *config,
            inputs,
            codes: Tensor::from_vec(stored.codes, (outputs, columns / 8 * config.bits), device)?,
            levels: Tensor::from_vec(stored.levels, &config.levels_shape(outputs, inputs), device)?,
            scales: Tensor::from_vec(stored.scales, (outputs, columns / group), device)?,
            outliers,
        })
    }

    /// Values of a row of the product.
    pub fn outputs(&self) -> usize {
        self.codes.dims()[0]
    }

    /// Values of a row that it is a product of.
    pub fn inputs(&self) -> usize {
        self.inputs
    }

    /// The settings.
    pub fn config(&self) -> LutConfig {
        self.config
    }

    /// The codes, u8 `(outputs, bytes)`. Those of 64 columns lie in `8 * bits` bytes: eight fields of as many bits as a code make a number,
    /// the first in the low bits, and field `i` of number `t` is the code of column `8 i + t`. Codes of three bits are fields of
    /// two for their low bits, in numbers of 16, and after these fields of one, in bytes.
    pub fn codes(&self) -> &Tensor {
        &self.codes
    }

    /// The levels, f16 `(outputs, tables, 2^bits)`, ascending: one table, or one for each group; `(1, 1, 2^bits)` if all outputs share them.
    pub fn levels(&self) -> &Tensor {
        &self.levels
    }

    /// The scales, f16 `(outputs, groups)`.
    pub fn scales(&self) -> &Tensor {
        &self.scales
    }

    /// The columns of the outliers, u32, and what they are more than their levels, f16: `(outputs, outliers)` each.
    pub fn outliers(&self) -> Option<(&Tensor, &Tensor)> {
        self.outliers.as_ref().map(|(columns, values)| (columns, values))
    }

    /// Bits that are stored of a weight: codes, levels, scales and outliers.
    pub fn bits_per_weight(&self) -> f64 {
        let bytes: usize = self.tensors().iter().map(|(_, t)| t.elem_count() * t.dtype().size_in_bytes()).sum();
        (8 * bytes) as f64 / (self.outputs() * self.inputs) as f64
    }

    /// The weights as numbers, f32 `(outputs, inputs)`.
    ///
    /// # Errors
    /// Fails where the device does.
    pub fn dequantize(&self) -> Result<Tensor> {
        Ok(Tensor::cat(&self.tiles(Ok)?, 0)?)
    }

    /// The products of `x` `(.., inputs)` with each output, in the dtype of `x`, f16, bf16 or f32: `(.., outputs)`. Sums are in f32. On a
    /// CPU, and of at most 128 rows on a GPU, codes are read as they lie; else as many outputs as have 16 million weights are decoded at a time. No
    /// gradient flows.
    ///
    /// # Errors
    /// Refuses other numbers of columns, dtypes and devices.
    pub fn matmul(&self, x: &Tensor) -> Result<Tensor> {
        self.product(x, None)
    }

    fn product(&self, x: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
        let got = x.dims().last().copied().unwrap_or(0);
        if got != self.inputs {
            return Err(Error::Size { argument: "x", what: "columns", got, expected: self.inputs });
        }
        if !matches!(x.dtype(), DType::F16 | DType::BF16 | DType::F32) {
            return Err(Error::DType { argument: "x", got: x.dtype(), expected: "F16, BF16 or F32".into() });
        }
        problem::check_device("x", x, self.codes.device())?;
        let shape = [&x.dims()[..x.rank() - 1], &[self.outputs()]].concat();
        if x.elem_count() == 0 {
            return problem::empty(&shape, x.dtype(), x.device());
        }
        let rows = x.detach().reshape(((), self.inputs))?;
        let looked_up = primitives::lut_product(&Rows::new(&rows.unsqueeze(0)?)?, &self.matrix(), bias)?;
        let product = looked_up.map_or_else(|| self.by_tiles(&rows, bias), Ok)?;
        Ok(product.reshape(shape)?)
    }

    fn matrix(&self) -> LutMatrix<'_> {
        let outliers = self.outliers.as_ref().map(|(columns, values)| Outliers { columns, values });
        let Self { inputs, codes, levels, scales, .. } = self;
        LutMatrix { inputs: *inputs, bits: self.config.bits, codes, levels, scales, outliers }
    }

    /// By Candle's products with weights that are decoded tile by tile.
    fn by_tiles(&self, rows: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
        let in_f32 = rows.to_dtype(DType::F32)?;
        let product = Tensor::cat(&self.tiles(|weights| Ok(in_f32.matmul(&weights.t()?)?))?, 1)?;
        let product = bias.map_or_else(|| Ok(product.clone()), |bias| product.broadcast_add(bias))?;
        Ok(product.to_dtype(rows.dtype())?)
    }

    /// What `f` makes of the weights, tile by tile, f32 `(some, inputs)`.
    fn tiles(&self, f: impl Fn(Tensor) -> Result<Tensor>) -> Result<Vec<Tensor>> {
        let (outputs, each) = (self.outputs(), (DECODED / self.inputs).max(1));
        (0..outputs).step_by(each).map(|first| f(self.decoded(first, each.min(outputs - first))?)).collect()
    }

    /// The weights of so many outputs, f32.
    fn decoded(&self, first: usize, count: usize) -> Result<Tensor> {
        if let Some(weights) = primitives::lut_decode(&self.matrix(), first..first + count)? {
            return Ok(weights);
        }
        let part = |t: &Tensor| t.narrow(0, first, count)?.contiguous();
        let (_, tables, entries) = self.levels.dims3()?;
        let levels = self.levels.broadcast_as((self.outputs(), tables, entries))?;
        let [levels, scales] = [&levels, &self.scales].map(|t| part(t)?.to_dtype(DType::F32));
        let (levels, scales) = (levels?, scales?);
        let codes = pack::unpack(&part(&self.codes)?, self.config.bits)?;
        let columns = codes.dim(1)?;
        let weights = levels.gather(&codes.reshape((count, tables, columns / tables))?, 2)?;
        let groups = scales.dim(1)?;
        let weights = weights.reshape((count, groups, columns / groups))?.broadcast_mul(&scales.unsqueeze(2)?)?;
        let weights = weights.reshape((count, columns))?;
        let weights = match &self.outliers {
            Some((at, values)) => weights.scatter_add(&part(at)?, &part(values)?.to_dtype(DType::F32)?, 1)?,
            None => weights,
        };
        Ok(weights.narrow(1, 0, self.inputs)?.contiguous()?)
    }

    /// The same on another device.
    ///
    /// # Errors
    /// Fails where a device does.
    pub fn to_device(&self, device: &Device) -> Result<Self> {
        let outliers = self.outliers.as_ref();
        let outliers = outliers
            .map(|(at, values)| Ok::<_, Error>((host::to_device(at, device)?, host::to_device(values, device)?)));
        Ok(Self {
            codes: host::to_device(&self.codes, device)?,
            levels: host::to_device(&self.levels, device)?,
            scales: host::to_device(&self.scales, device)?,
            outliers: outliers.transpose()?,
            ..*self
        })
    }

    /// All that is stored, by name.
    fn tensors(&self) -> Vec<(&'static str, &Tensor)> {
        let outliers = self.outliers.iter();
        let outliers = outliers.flat_map(|(at, values)| [("outlier_columns", at), ("outlier_values", values)]);
        [("codes", &self.codes), ("levels", &self.levels), ("scales", &self.scales)]
            .into_iter()
            .chain(outliers)
            .collect()
    }

    fn read(file: &mut Saved, device: &Device) -> Result<Self> {
        let config = LutConfig {
            bits: file.setting("bits")?,
            group_size: file.setting("group_size")?,
            levels: {
                let name: String = file.setting("levels")?;
                Granularity::named(&name).ok_or_else(|| file.bad(format!("levels: {name} have none")))?
            },
            outliers: file.setting("outliers")?,
            rounds: file.setting("rounds")?,
        };
        let inputs: usize = file.setting("inputs")?;
        config.check(inputs).map_err(|e| file.bad(e.to_string()))?;
        let scales = file.take("scales")?;
        let limit = problem::MAX_ROWS;
        if scales.rank() != 2 || scales.elem_count() == 0 || inputs == 0 || inputs > limit || config.group_size > limit
        {
            return Err(file.bad(format!(
                "scales {:?} of {inputs} inputs, in groups of {}",
                scales.dims(),
                config.group_size
            )));
        }
        let (outputs, (group, columns)) = (scales.dims()[0], config.columns(inputs));
        let groups = columns / group;
        let mut exactly = |name, dtype, shape: [usize; 3]| {
            let shape = if name == "levels" { &shape[..] } else { &shape[..2] };
            file.exactly(name, dtype, Some(shape))
        };
        let codes = exactly("codes", DType::U8, [outputs, columns / 8 * config.bits, 0])?;
        let levels = exactly("levels", DType::F16, config.levels_shape(outputs, inputs))?;
        let mut outliers = None;
        if config.outliers > 0 {
            let at = exactly("outlier_columns", DType::U32, [outputs, config.outliers, 0])?;
            let values = exactly("outlier_values", DType::F16, [outputs, config.outliers, 0])?;
            if let Some(row) = at.to_vec2::<u32>()?.iter().find(|row| !ascends(row, inputs)) {
                return Err(file.bad(format!("outlier columns {row:?} of {inputs} inputs do not ascend")));
            }
            outliers = Some((at, values));
        }
        if (scales.dtype(), scales.dims()) != (DType::F16, &[outputs, groups]) {
            return Err(file.bad(format!("scales are {:?} {:?}", scales.dtype(), scales.dims())));
        }
        for t in [&levels].into_iter().chain(outliers.iter().map(|(_, values)| values)) {
            if !all_finite(t)? {
                return Err(file.bad("levels or outliers hold a NaN or an infinity".into()));
            }
        }
        Self { config, inputs, codes, levels, scales, outliers }.to_device(device)
    }
}

/// Whether different columns of so many come one after another.
fn ascends(columns: &[u32], inputs: usize) -> bool {
    columns.is_sorted_by(|a, b| a < b) && columns.last().is_none_or(|&c| (c as usize) < inputs)
}

fn check_float(argument: &'static str, t: &Tensor) -> Result<()> {
    match t.dtype() {
        DType::F16 | DType::BF16 | DType::F32 | DType::F64 => Ok(()),
        got => Err(Error::DType { argument, got, expected: "F16, BF16, F32 or F64".into() }),
    }
}

/// The sizes of a float matrix that has elements.
fn dims2_float(argument: &'static str, t: &Tensor) -> Result<[usize; 2]> {
    check_float(argument, t)?;
    match *t.dims() {
        [a, b] if a * b > 0 => Ok([a, b]),
        [_, _] => Err(Error::Range { argument: "weight elements", got: 0, min: 1, max: usize::MAX }),
        _ => Err(Error::Size { argument, what: "number of dimensions", got: t.rank(), expected: 2 }),
    }
}

/// Weights of so many inputs an output, which fit an f16.
fn checked_weights(weight: &Tensor, inputs: usize) -> Result<Vec<f32>> {
    let weights = finite("weight", weight, inputs)?;
    if let Some(w) = weights.iter().find(|w| w.abs() > f16::MAX.to_f32()) {
        return Err(Error::Value { argument: "weight", got: f64::from(*w), expected: "within 65504, as f16 is" });
    }
    Ok(weights)
}

/// The values of a matrix, which are finite.
fn finite(argument: &'static str, t: &Tensor, columns: usize) -> Result<Vec<f32>> {
    let values = on_host(t)?;
    match values.iter().position(|v| !v.is_finite()) {
        Some(i) => Err(Error::NonFinite { argument, batch: 0, row: i / columns }),
        None => Ok(values),
    }
}

fn on_host(t: &Tensor) -> Result<Vec<f32>> {
    Ok(t.detach().to_device(&Device::Cpu)?.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?)
}
