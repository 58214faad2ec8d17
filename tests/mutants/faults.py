"""Mendings of faults undone: data, models, training, evaluation, serving."""

from __future__ import annotations

from mutants.mutant import Mutant

MUTANTS: tuple[Mutant, ...] = (
    Mutant(
        "a photo is decoded twice",
        "src/stocktake/data/checks.py",
        "            if photos is not None:\n",
        "            if photos is None:\n",
        ("tests/data/test_manifest.py::test_a_photo_is_read_and_decoded_once",),
    ),
    Mutant(
        "an item's popularity squared",
        "src/stocktake/data/near_duplicates.py",
        "is_common = bins_of_kind @ incidence > common_item",
        "is_common = bins_of_kind @ incidence > len(items)",
        ("tests/data/test_near_duplicates.py::test_an_item_in_many_bins_takes_memory_in_proportion_to_them",),
    ),
    Mutant(
        "popular items chain bins",
        "src/stocktake/data/near_duplicates.py",
        "is_common = bins_of_kind @ incidence > common_item",
        "is_common = bins_of_kind @ incidence > len(items)",
        ("tests/data/test_near_duplicates.py::test_bestsellers_alone_do_not_chain_bins_into_one_group",),
    ),
    Mutant(
        "largest group of the task alone",
        "src/stocktake/data/manifest.py",
        'largest_group=int(usable["group"]',
        'largest_group=int(bins["group"]',
        ("tests/data/test_manifest.py::test_the_largest_group_is_reported",),
    ),
    Mutant(
        "grouped after the task",
        "src/stocktake/data/manifest.py",
        "    usable, split_config, conflicts = _decide_splits(usable, config, source, folder)\n",
        '    usable = usable[usable["quantity"].isin(labels)].reset_index(drop=True)\n'
        "    usable, split_config, conflicts = _decide_splits(usable, config, source, folder)\n",
        ("tests/data/test_manifest.py::test_a_split_does_not_depend_on_the_limit_nor_on_the_task",),
    ),
    Mutant(
        "grouped after the limit",
        "src/stocktake/data/manifest.py",
        "    usable, split_config, conflicts = _decide_splits(usable, config, source, folder)\n",
        "    usable = usable[: config.limit].reset_index(drop=True)\n"
        "    usable, split_config, conflicts = _decide_splits(usable, config, source, folder)\n",
        ("tests/data/test_manifest.py::test_a_split_does_not_depend_on_the_limit_nor_on_the_task",),
    ),
    Mutant(
        "checks saved at the end",
        "src/stocktake/data/checks.py",
        "            with transaction(path, _TABLE) as connection:\n"
        "                connection.executemany(_INSERT, [row for row, _ in results])\n",
        "            rows = [*(rows if begin else []), *(row for row, _ in results)]\n"
        "            if begin + _CHUNK >= len(unchecked):\n"
        "                with transaction(path, _TABLE) as connection:\n"
        "                    connection.executemany(_INSERT, rows)\n",
        ("tests/data/test_manifest.py::test_checks_are_saved_as_they_are_made",),
    ),
    Mutant(
        "cache mapped into memory",
        "src/stocktake/data/array_cache.py",
        "        arrays = np.empty((len(keys), *self.shape), dtype=self.dtype)\n",
        "        arrays = np.empty((len(keys), *self.shape), dtype=self.dtype)\n"
        "        import os\n"
        "        self._map = vars(self).get('_map') or __import__('mmap').mmap(os.open(self.path, 0), 0, access=1)\n"
        "        self._map[-1]\n",
        ("tests/data/test_array_cache.py::test_a_file_that_is_cut_while_it_is_read_is_one_error",),
    ),
    Mutant(
        "damaged cache is a traceback",
        "src/stocktake/data/sqlite_file.py",
        "except sqlite3.DatabaseError as error:",
        "except sqlite3.NotSupportedError as error:",
        ("tests/data/test_array_cache.py::test_a_damaged_file_is_begun_anew",),
    ),
    Mutant(
        "damaged values given out",
        "src/stocktake/data/array_cache.py",
        " or zlib.crc32(data) != checksum",
        "",
        ("tests/data/test_array_cache.py::test_damaged_values_are_never_given_out",),
    ),
    Mutant(
        "damaged checks end the run",
        "src/stocktake/data/sqlite_file.py",
        "    except DamagedFileError:\n",
        "    except ZeroDivisionError:\n",
        ("tests/data/test_manifest.py::test_damaged_checks_are_made_again",),
    ),
    Mutant(
        "photo cache of another preprocessing",
        "src/stocktake/data/photos.py",
        "px-v{PREPROCESSING_VERSION}.sqlite",
        "px.sqlite",
        ("tests/data/test_photos.py::test_photos_of_another_preprocessing_are_not_used",),
    ),
    Mutant(
        "features of another preprocessing",
        "src/stocktake/models/linear_probe.py",
        "{precision} v{PREPROCESSING_VERSION}",
        "{precision}",
        ("tests/models/test_linear_probe.py::test_the_fingerprint_tells_weights_sizes_and_formats_apart",),
    ),
    Mutant(
        "16-bit photos are white",
        "src/stocktake/data/images.py",
        "(_to_8_bit(photo) if _is_16_bit(photo) else photo).convert",
        "photo.convert",
        ("tests/data/test_images.py::test_a_16_bit_greyscale_photo_is_scaled",),
    ),
    Mutant(
        "temporary names by process id",
        "src/stocktake/files.py",
        "{uuid.uuid4().hex}",
        "{__import__('os').getpid()}",
        ("tests/test_files.py::test_two_containers_on_one_disk_do_not_share_a_temporary",),
    ),
    Mutant(
        "Lite0's weights mapped wrongly",
        "src/stocktake/models/backbones.py",
        "    return dict(zip([*network.state_dict(),",
        "    state = {name: state[name.replace('_bn1.weight', '_bn1.running_var')] for name in state}\n"
        "    return dict(zip([*network.state_dict(),",
        ("tests/models/test_backbones.py::test_the_wheels_weights_recognise_what_imagenet_knows",),
    ),
    Mutant(
        "bf16 for depthwise convolutions",
        "src/stocktake/models/precision.py",
        " and not _has_depthwise_convolutions(model)",
        "",
        ("tests/models/test_precision.py::test_auto_is_a_rule_of_processor_and_network",),
    ),
    Mutant(
        "number format chosen anew on resume",
        "src/stocktake/stages/finetune.py",
        'if checkpoint is not None and config.precision == "auto":',
        "if False:",
        ("tests/commands/test_stages.py::test_finetune_goes_on_from_a_run_folder",),
    ),
    Mutant(
        "classical with few bins is a constant",
        "src/stocktake/models/pca_svm.py",
        "len(pixels) // _BINS_A_COMPONENT",
        "len(pixels)",
        ("tests/models/test_pca_svm.py::test_fewer_photos_than_components_is_no_constant",),
    ),
    Mutant(
        "patience ignored on resume",
        "src/stocktake/training/checkpoints.py",
        'load_state_dict({**state_dict, "patience": self.patience})',
        "load_state_dict(state_dict)",
        ("tests/training/test_fit.py::test_patience_counts_on_when_resumed",),
    ),
    Mutant(
        "a job's error is what followed from it",
        "src/stocktake/commands/ddp.py",
        "rank = min(failures, key=order)",
        "rank = min(failures)",
        ("tests/commands/test_ddp.py::test_the_first_failure_is_named_and_not_what_follows",),
    ),
    Mutant(
        "failed job leaves its run RUNNING",
        "src/stocktake/commands/ddp.py",
        "                end_failed_run(run, config.tracking, status, str(error))\n",
        "                pass\n",
        ("tests/commands/test_ddp.py::test_one_line_names_the_process_that_failed_and_the_run_is_failed",),
    ),
    Mutant(
        "rendezvous on every interface",
        "src/stocktake/commands/ddp.py",
        "listener = socket.create_server((host, int(port)))",
        'listener = socket.create_server(("", int(port)))',
        ("tests/commands/test_ddp.py::test_sigterm_ends_all_processes_and_nothing_listens_beyond_the_loopback",),
    ),
    Mutant(
        "gloo on every interface",
        "src/stocktake/distributed.py",
        "            os.environ.update(dict.fromkeys(variables, name))\n",
        "            pass\n",
        ("tests/test_distributed.py::test_collectives_of_two_processes",),
    ),
    Mutant(
        "calibrated twice",
        "src/stocktake/evaluation/evaluation.py",
        'values["loss"] = cross_entropy(self._calibrated,',
        "twice = self.calibration.apply(self._calibrated) if self.calibration else self._calibrated\n"
        '        values["loss"] = cross_entropy(twice,',
        ("tests/evaluation/test_evaluation.py::test_a_calibration_is_applied_once_and_its_effect_is_measured",),
    ),
    Mutant(
        "uncalibrated is calibrated",
        "src/stocktake/evaluation/evaluation.py",
        '{"uncalibrated": self.probabilities,',
        '{"uncalibrated": self._calibrated,',
        ("tests/evaluation/test_evaluation.py::test_a_calibration_is_applied_once_and_its_effect_is_measured",),
    ),
    Mutant(
        "probabilities have two shapes",
        "src/stocktake/serving/pyfunc.py",
        "pd.Series([row[name] for row in records], dtype=object)",
        'pd.Series([[*row[name].values()] if name == "probabilities" else row[name] for row in records], dtype=object)',
        ("tests/serving/test_pyfunc.py::test_the_loaded_model_answers_as_the_predictor_does",),
    ),
    Mutant(
        "ping while prediction is stuck",
        "src/stocktake/serving/engine_pool.py",
        'return "prediction is stuck"',
        "return None",
        ("tests/serving/test_server_limits.py::test_a_full_queue_refuses_and_ping_fails_while_prediction_is_stuck",),
    ),
    Mutant(
        "ping while prediction is dead",
        "src/stocktake/serving/engine_pool.py",
        'return "prediction fails" if self._failures >= MAX_FAILURES else None',
        "return None",
        ("tests/serving/test_server_limits.py::test_a_failing_engine_is_logged_by_request_and_fails_the_ping",),
    ),
    Mutant(
        "a request as large as the queue",
        "src/stocktake/serving/app.py",
        "self.pool.waiting >= self._settings.max_queue",
        "self.pool.waiting + len(photos) > self._settings.max_queue",
        ("tests/serving/test_server.py::test_a_6_mb_payload_of_small_photos_is_answered",),
    ),
    Mutant(
        "a bad photo ends a batch job",
        "src/stocktake/serving/supervisor.py",
        'os.environ.get("SAGEMAKER_BATCH", "").lower() == "true"',
        "False",
        ("tests/serving/test_serve.py::test_as_sagemaker_starts_it",),
    ),
    Mutant(
        "a bad photo of a list ends a batch job",
        "src/stocktake/serving/app.py",
        " and not self._batch_mode:",
        ":",
        ("tests/serving/test_server.py::test_in_batch_mode_a_bad_photo_is_an_error_record",),
    ),
    Mutant(
        "a bad line loses the others",
        "src/stocktake/serving/app.py",
        'if errors and payload.format != "lines" and not self._batch_mode:',
        "if errors and not self._batch_mode:",
        ("tests/serving/test_server.py::test_a_line_a_photo_loses_none",),
    ),
    Mutant(
        "custom attributes not returned",
        "src/stocktake/serving/telemetry.py",
        "            returned[CUSTOM_ATTRIBUTES] = headers[CUSTOM_ATTRIBUTES]\n",
        "            pass\n",
        ("tests/serving/test_server.py::test_sagemakers_custom_attributes_are_logged_and_returned",),
    ),
    Mutant(
        "custom attributes not logged",
        "src/stocktake/serving/telemetry.py",
        '"custom_attributes": returned.get(CUSTOM_ATTRIBUTES)',
        '"custom_attributes": None',
        ("tests/serving/test_server.py::test_sagemakers_custom_attributes_are_logged_and_returned",),
    ),
    Mutant(
        "a bad photo ends a Spark job",
        "src/stocktake/serving/pyfunc.py",
        "for outcome in self._predictor.predict_each(photos)]",
        "for outcome in self._predictor.predict(list(photos))]",
        ("tests/serving/test_pyfunc.py::test_the_loaded_model_answers_as_the_predictor_does",),
    ),
    Mutant(
        "a Spark batch decoded at once",
        "src/stocktake/serving/predictor.py",
        "list(islice(remaining, CHUNK))",
        "list(remaining)",
        ("tests/serving/test_spark.py::test_many_rows_take_no_more_memory_than_a_few",),
    ),
    Mutant(
        "a logged model carries the package",
        "src/stocktake/serving/pyfunc.py",
        "code_paths=[str(_copy_code(Path(temporary)))]",
        "code_paths=[str(Path(__file__).parents[1])]",
        ("tests/serving/test_pyfunc.py::test_the_folder_has_graph_and_the_code_it_needs_and_no_pickle",),
    ),
    Mutant(
        "an endpoint's server without -P",
        "src/stocktake/serving/endpoints.py",
        '[sys.executable, "-P", "-m", "stocktake.serving.serve", "--endpoint", str(folder)]',
        '[sys.executable, "-m", "stocktake.serving.serve", "--endpoint", str(folder)]',
        ("tests/serving/test_endpoints.py::test_it_outlives_the_call_and_is_found_by_another_process",),
    ),
    Mutant(
        "run-local's server without -P",
        "src/stocktake/serving/local_target.py",
        '[sys.executable, "-P", "-m", "stocktake.serving.serve", str(model)]',
        '[sys.executable, "-m", "stocktake.serving.serve", str(model)]',
        ("tests/serving/test_local_target.py::test_run_local_and_its_help",),
    ),
)
