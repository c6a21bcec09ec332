--- Every metric there is: name, type, labels and help. docs/observability.md has the same table; a spec compares them.
-- @module moonrabbit.metrics.families

local families = {}

--- Labels whose values are words of our own: a family that is full keeps them.
families.closed = { "outcome", "kind", "result", "what", "strategy", "version", "then" }

--- What the broker has, and every process that looks sees: not to be added up.
families.shared = {
  moonrabbit_ladder_known = true, moonrabbit_ladder_waiting = true, moonrabbit_ladder_stuck = true,
  moonrabbit_ladder_orphans = true,
}

--- In the order of the page: name, type, labels, help.
families.list = {
  -- What an app handles
  { "moonrabbit_messages_delivered_total", "counter", { "queue" }, "Messages that have come." },
  { "moonrabbit_messages_settled_total", "counter", { "queue", "outcome" },
    "Messages by what became of them: ok, retry, dead_letter, drop, duplicate, requeue." },
  { "moonrabbit_handler_seconds", "histogram", { "queue" }, "How long handlers took, failed ones included." },
  { "moonrabbit_handler_failures_total", "counter", { "queue", "kind" },
    "Runs of handlers that failed: error, permanent, timeout, nonsense, asked." },
  { "moonrabbit_messages_in_flight", "gauge", { "queue" }, "Messages that have come and have no outcome yet." },
  { "moonrabbit_handlers_stuck", "gauge", { "queue" },
    "Handlers that run on although their time was over." },
  { "moonrabbit_copies_failed_total", "counter", { "queue", "what", "then" },
    "Copies (what: retry, dead_letter) that failed; then: tried_again, or given_back, the original that is." },
  { "moonrabbit_breaker_open", "gauge", { "queue" }, "1 while the breaker of a consumer is open." },
  { "moonrabbit_breaker_openings_total", "counter", { "queue" }, "How often a breaker opened." },
  { "moonrabbit_dedupe_away_total", "counter", { "queue" },
    "Tries at a de-duplication store that could not be reached." },
  { "moonrabbit_canary_runs_total", "counter", { "route", "version", "result" },
    "Runs of each version of a canary; result: ok or failed." },
  { "moonrabbit_canary_seconds", "histogram", { "route", "version" }, "How long each version of a canary took." },
  { "moonrabbit_canary_rollbacks_total", "counter", { "route" }, "Canaries that were rolled back." },
  { "moonrabbit_events_total", "counter", { "event" }, "Other events of an app." },
  -- What waits in the broker
  { "moonrabbit_ladder_known", "gauge", { "ladder" }, "1 when the last look at the ladder succeeded, else 0." },
  { "moonrabbit_ladder_waiting", "gauge", { "ladder", "step" },
    "Messages that wait on a step for their next attempt." },
  { "moonrabbit_ladder_stuck", "gauge", { "ladder", "step" },
    "Messages whose wait is over and that cannot go home; only with the management API." },
  { "moonrabbit_ladder_orphans", "gauge", { "ladder" }, "Messages whose consumer queue is gone." },
  -- moonrabbit run
  { "moonrabbit_reloads_total", "counter", { "result" }, "Reloads of the script; result: ok or failed." },
  { "moonrabbit_workers", "gauge", {}, "Worker processes that there are to be." },
  { "moonrabbit_workers_ready", "gauge", {}, "Worker processes that consume." },
  { "moonrabbit_worker_restarts_total", "counter", {}, "Worker processes that ended and were replaced." },
  -- Publishing
  { "moonrabbit_publishes_total", "counter", { "publisher" }, "Messages that a publisher took." },
  { "moonrabbit_publish_errors_total", "counter", { "publisher", "kind" },
    "Publishes that failed, by kind of error; also those that were not taken." },
  { "moonrabbit_publish_seconds", "histogram", { "publisher" },
    "From send to the broker's confirm; of send_async, one at a time is timed." },
  { "moonrabbit_publishes_resent_total", "counter", { "publisher" }, "How often a message was sent again." },
  { "moonrabbit_publisher_unconfirmed", "gauge", { "publisher" }, "Messages that are not confirmed yet." },
  { "moonrabbit_publisher_window", "gauge", { "publisher" }, "The most messages that are kept." },
  { "moonrabbit_publisher_bytes", "gauge", { "publisher" }, "Bytes of bodies that are kept." },
  { "moonrabbit_outbox_messages", "gauge", { "publisher" }, "Messages in the outbox." },
  -- Connections
  { "moonrabbit_connections", "gauge", { "connection" }, "Connections that are watched." },
  { "moonrabbit_connection_up", "gauge", { "connection" }, "How many of them are open." },
  { "moonrabbit_connection_blocked", "gauge", { "connection" }, "How many the broker has blocked from publishing." },
  { "moonrabbit_connection_losses_total", "counter", { "connection", "kind" },
    "Connections lost, and attempts that failed." },
  { "moonrabbit_connection_recoveries_total", "counter", { "connection" }, "Connections that came back." },
  { "moonrabbit_recovery_errors_total", "counter", { "connection", "kind" },
    "What could not be restored: exchange, queue, binding, channel, consumer." },
  { "moonrabbit_consumer_recoveries_total", "counter", { "connection" }, "Consumers that were ended and came back." },
  { "moonrabbit_suspicions_total", "counter", { "connection", "strategy" },
    "Brokers whose silence ended a connection." },
  { "moonrabbit_channels", "gauge", { "connection" }, "Open channels." },
  { "moonrabbit_output_buffer_bytes", "gauge", { "connection" }, "Bytes that wait to be written." },
  { "moonrabbit_channel_unconfirmed", "gauge", { "connection" }, "Publishes that are not confirmed, on all channels." },
  { "moonrabbit_channel_unsettled", "gauge", { "connection" }, "Deliveries that are not settled, on all channels." },
}

-- A closed label has so many values at most: a family with one may have that many times the series.
local MOST_WORDS = 8

local function has_closed(labels)
  for _, label in ipairs(labels) do
    for _, closed in ipairs(families.closed) do
      if label == closed then return true end
    end
  end
  return false
end

--- Declares them all: name without "moonrabbit_" -> family.
---@param registry moonrabbit.metrics.Registry
---@return table<string, moonrabbit.metrics.Family>
function families.declare(registry)
  local all = {}
  for _, each in ipairs(families.list) do
    local name, kind, labels, help = each[1], each[2], each[3], each[4]
    all[name:match "^moonrabbit_(.*)$"] = registry[kind](registry, name, help, labels, {
      closed = families.closed, max_series = registry.max_series * (has_closed(labels) and MOST_WORDS or 1),
    })
  end
  return all
end

return families
