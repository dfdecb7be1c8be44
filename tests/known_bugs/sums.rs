//! Sums and means are right whatever else is in the tensor.
