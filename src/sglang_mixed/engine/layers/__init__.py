"""What SGLang's layers are given to hold and multiply their weights with, by format and device."""
