//! How keys or values become codes: what can be chosen, and what it is called.

use anyhow::{bail, ensure, Context, Error, Result};
use std::{fmt, str::FromStr};

/// What keeps the rows of all heads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Coder {
    Exact,
    /// Asymmetric integers, as KIVI has them (Liu et al. 2024).
    Integers {
        bits: usize,
        before: bool,
    },
    /// A random rotation and one scalar codebook (Zandieh et al. 2025).
    Turbo {
        bits: usize,
        before: bool,
    },
    Product(Product),
}

/// Product quantisation (Jegou et al. 2011) of keys before their rotation by position, or of values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Product {
    /// Values of a piece
    pub columns: usize,
    /// Of a codebook
    pub entries: usize,
    /// Each codes what those before leave over.
    pub stages: usize,
    pub basis: Basis,
    /// One codebook a head, for all of its pieces
    pub shared: bool,
    /// Tokens count by the attention that they get.
    pub read: bool,
    /// A row is its length times a direction, coded apart (gain and shape, Sabin and Gray 1984).
    pub lengths: bool,
    /// Codebooks are the other text's.
    pub of_other: bool,
}

/// What rows are turned into before they are cut into pieces.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Basis {
    Columns,
    Random,
    /// Their principal components, dealt to the pieces in turn
    Principal,
    /// Those of the other text's
    PrincipalOfOther,
}

impl Coder {
    /// Whether keys are coded as attention reads them, after their rotation by position.
    pub fn turned(self) -> bool {
        matches!(self, Self::Integers { before: false, .. } | Self::Turbo { before: false, .. })
    }

    /// The line of a chart that it is a point of.
    fn line(self) -> String {
        match self {
            Self::Exact => "f16".into(),
            Self::Integers { before, .. } => format!("int{}", if before { "+before" } else { "" }),
            Self::Turbo { before, .. } => format!("turbo{}", if before { "+before" } else { "" }),
            Self::Product(product) => {
                let stages = if product.stages > 1 { format!("x{}", product.stages) } else { String::new() };
                format!("{}xK{stages}{}", product.columns, product.words())
            }
        }
    }
}

impl Product {
    fn words(self) -> String {
        let basis = match self.basis {
            Basis::Columns => "",
            Basis::Random => "+random",
            Basis::Principal => "+pca",
            Basis::PrincipalOfOther => "+pca-of-other",
        };
        let flags =
            [(self.shared, "+shared"), (self.read, "+read"), (self.lengths, "+lengths"), (self.of_other, "+of-other")];
        flags.iter().filter(|(on, _)| *on).fold(basis.to_string(), |words, (_, word)| words + word)
    }
}

impl fmt::Display for Coder {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let rotation = |before: bool| if before { "+before" } else { "" };
        match *self {
            Self::Exact => write!(f, "f16"),
            Self::Integers { bits, before } => write!(f, "int{bits}{}", rotation(before)),
            Self::Turbo { bits, before } => write!(f, "turbo{bits}{}", rotation(before)),
            Self::Product(product) => {
                write!(f, "{}x{}", product.columns, product.entries)?;
                if product.stages > 1 {
                    write!(f, "x{}", product.stages)?;
                }
                write!(f, "{}", product.words())
            }
        }
    }
}

impl FromStr for Coder {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let number = |text: &str| text.parse::<usize>().with_context(|| format!("{text} is no number"));
        let (first, words) = text.split_once('+').unwrap_or((text, ""));
        let words: Vec<_> = words.split('+').filter(|word| !word.is_empty()).collect();
        let unknown = |word: &str| format!("{text}: {word} is nothing that {first} has");
        let before = || match words[..] {
            [] => Ok(false),
            ["before"] => Ok(true),
            _ => bail!(unknown(&words.join("+"))),
        };
        if let Some(bits) = first.strip_prefix("int") {
            return Ok(Self::Integers { bits: between(number(bits)?, 1, 8)?, before: before()? });
        }
        if let Some(bits) = first.strip_prefix("turbo") {
            return Ok(Self::Turbo { bits: between(number(bits)?, 1, 8)?, before: before()? });
        }
        if first == "f16" {
            ensure!(words.is_empty(), unknown(&words.join("+")));
            return Ok(Self::Exact);
        }
        let sizes = first.split('x').map(number).collect::<Result<Vec<_>>>()?;
        let (columns, entries, stages) = match sizes[..] {
            [columns, entries] => (columns, entries, 1),
            [columns, entries, stages] => (columns, entries, stages),
            _ => bail!("{first} is not VALUESxENTRIES or VALUESxENTRIESxSTAGES"),
        };
        let [shared, read, lengths, of_other] = [false; 4];
        let [columns, stages, entries] =
            [between(columns, 1, 64)?, between(stages, 1, 8)?, between(entries, 2, MOST_ENTRIES)?];
        let mut product = Product { columns, entries, stages, basis: Basis::Columns, shared, read, lengths, of_other };
        for word in words {
            match word {
                "random" => product.basis = Basis::Random,
                "pca" => product.basis = Basis::Principal,
                "pca-of-other" => product.basis = Basis::PrincipalOfOther,
                "shared" => product.shared = true,
                "read" => product.read = true,
                "lengths" => product.lengths = true,
                "of-other" => product.of_other = true,
                _ => bail!(unknown(word)),
            }
        }
        Ok(Self::Product(product))
    }
}

/// Entries of a codebook are found among the rows of a prompt, of which there are at least so many.
pub const MOST_ENTRIES: usize = 256;

fn between(number: usize, least: usize, most: usize) -> Result<usize> {
    ensure!((least..=most).contains(&number), "{number} is not in {least}..={most}");
    Ok(number)
}

/// Keys and values may be kept differently: `KEYS/VALUES`, or one word for both.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Method {
    pub keys: Coder,
    pub values: Coder,
}

impl Method {
    pub const EXACT: Self = Self { keys: Coder::Exact, values: Coder::Exact };

    /// The line of a chart that it is a point of.
    pub fn line(self) -> String {
        match (self.keys.line(), self.values.line()) {
            (keys, values) if keys == values => keys,
            (keys, values) => format!("{keys} / {values}"),
        }
    }
}

impl fmt::Display for Method {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self.keys == self.values {
            true => write!(f, "{}", self.keys),
            false => write!(f, "{} / {}", self.keys, self.values),
        }
    }
}

impl FromStr for Method {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let (keys, values) = text.split_once('/').unwrap_or((text, text));
        Ok(Self { keys: keys.trim().parse()?, values: values.trim().parse()? })
    }
}
