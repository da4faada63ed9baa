"""Expert parallelism as it is measured: the plain one, what is sent, what runs at the same time, a trial on a rank."""
