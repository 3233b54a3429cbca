use jsonrpsee::types::ErrorObjectOwned;
use lotus_node_client::NodeError;
use lotus_runtime::Fault;
use lotus_sealing::SealingError;
use lotus_tokens::Perm;

/// Code of an error that a method returns. Source: go-jsonrpc, which uses 1 for every error
/// without a registered type.
const FAILED: i32 = 1;
/// Source: the JSON-RPC 2.0 specification.
const INVALID_PARAMS: i32 = -32602;
/// Where Lotus sees a parameter that does not decode. Source: go-jsonrpc.
const PARSE_ERROR: i32 = -32700;

/// Why a call has no result, in the words and codes of Lotus where it has them.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub(crate) struct RpcError {
    code: i32,
    message: String,
}

impl RpcError {
    fn new(code: i32, message: String) -> Self {
        Self { code, message }
    }

    /// The method says no.
    pub(crate) fn failed(message: impl Into<String>) -> Self {
        Self::new(FAILED, message.into())
    }

    /// The caller lacks a permission.
    pub(crate) fn denied(method: &str, need: Perm) -> Self {
        Self::failed(format!(
            "missing permission to invoke '{method}' (need '{need}')"
        ))
    }

    pub(crate) fn param_count(method: &str, given: usize, wanted: usize) -> Self {
        Self::new(
            INVALID_PARAMS,
            format!("wrong param count (method 'Filecoin.{method}'): {given} != {wanted}"),
        )
    }

    pub(crate) fn param(method: &str, name: &str, e: &serde_json::Error) -> Self {
        Self::new(
            PARSE_ERROR,
            format!("unmarshaling params for 'Filecoin.{method}' (param: {name}): {e}"),
        )
    }
}

impl From<NodeError> for RpcError {
    fn from(e: NodeError) -> Self {
        Self::failed(format!("full node: {e}"))
    }
}

impl From<SealingError> for RpcError {
    fn from(e: SealingError) -> Self {
        Self::failed(format!("{e} ({})", e.fix()))
    }
}

impl From<Fault> for RpcError {
    fn from(e: Fault) -> Self {
        Self::failed(format!("{} ({})", e.message, e.fix))
    }
}

impl From<std::io::Error> for RpcError {
    fn from(e: std::io::Error) -> Self {
        Self::failed(e.to_string())
    }
}

impl From<RpcError> for ErrorObjectOwned {
    fn from(e: RpcError) -> Self {
        Self::owned(e.code, e.message, None::<()>)
    }
}
