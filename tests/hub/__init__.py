"""A Hugging Face Hub on loopback; tests take it from `hub_server`.

No maintained server fits: olah mirrors and takes no uploads, the wheel of hf-local-hub lacks the
binary that it starts, and KohakuHub needs LakeFS, MinIO and Postgres. None of them injects faults.
"""
