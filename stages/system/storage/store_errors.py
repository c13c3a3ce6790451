"""What the errors of object stores mean: their HTTP status, and the refusal of one that trying again cannot mend."""

import errno
from collections.abc import Mapping

from stages.system.disk import unwritable_error
from stages.system.refusal import Refused, in_one_line
from stages.system.storage.locations import Location, storage_folder

LOGINS = {
    "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE",
    "gs": "run gcloud auth application-default login",
    "hf": "run hf auth login, or set HF_TOKEN",
}
NO_CREDENTIALS = ("NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "ProfileNotFound")
DENIED_CODES = ("InvalidAccessKeyId", "SignatureDoesNotMatch", "AccessDenied", "ExpiredToken")
LOCAL_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EMFILE, errno.ENFILE}
"""Of this machine's disk, not of the store."""


def http_status(error: BaseException | None) -> int:
    """The HTTP status of a botocore error; 0 for any other."""
    response = getattr(error, "response", None)
    meta = response.get("ResponseMetadata", {}) if isinstance(response, Mapping) else {}
    status = meta.get("HTTPStatusCode", 0)
    return status if isinstance(status, int) else 0


def lasting_refusal(location: Location, error: BaseException) -> Refused | None:
    """The refusal of an error that trying again cannot mend; None for any other."""
    causes = [error, *(cause for cause in (error.__cause__, error.__context__) if cause is not None)]
    kinds = {kind.__name__ for cause in causes for kind in type(cause).__mro__}
    login = LOGINS[location.scheme]
    if kinds.intersection(NO_CREDENTIALS):
        return Refused(f"{location}: no credentials ({in_one_line(error)}) - {login}")
    if isinstance(error, PermissionError) or any(code in str(error) for code in DENIED_CODES):
        return Refused(f"{location}: access denied ({in_one_line(error)}) - {login}, or choose another bucket")
    if isinstance(error, OSError) and error.errno in LOCAL_ERRORS:
        return unwritable_error(storage_folder(), error)
    if kinds & {"ParamValidationError", "InvalidRegionError", "InvalidConfigError"} or "InvalidBucketName" in str(
        error
    ):
        return Refused(f"{location}: not taken by the store ({in_one_line(error)}) - mend the name or the settings")
    return None
