--- What an app tells, as metrics: the table for the option `observer` of mr.app.
--
-- The series of a queue are found once and kept; after that a message costs additions only.
-- @module moonrabbit.metrics.observer

local guard = require "moonrabbit.app.observer".guard

local observer = {}

-- Queues and canaries that are remembered; more are looked up each time.
local MOST = 1000

-- A function (key) -> what make(key) gave first.
local function remembered(make)
  local all, count = {}, 0
  return function(key)
    local found = all[key]
    if found then return found end
    found = make(key)
    if count < MOST then all[key], count = found, count + 1 end
    return found
  end
end

local OUTCOMES = { "ok", "retry", "dead_letter", "drop", "duplicate", "requeue" }

--- Puts the series of a queue on the page, at zero: Prometheus sees no increase in what begins at one.
---@param families table<string, moonrabbit.metrics.Family>
---@param queue string
function observer.prepare(families, queue)
  for _, outcome in ipairs(OUTCOMES) do families.messages_settled_total:with(queue, outcome) end
  families.messages_delivered_total:with(queue)
  families.messages_in_flight:with(queue)
  families.handler_seconds:with(queue)
end

local function queue_series(families)
  return remembered(function(queue)
    observer.prepare(families, queue)
    return {
      delivered = families.messages_delivered_total:with(queue),
      in_flight = families.messages_in_flight:with(queue),
      seconds = families.handler_seconds:with(queue),
      outcome = remembered(function(outcome) return families.messages_settled_total:with(queue, outcome) end),
      kind = remembered(function(kind) return families.handler_failures_total:with(queue, kind) end),
    }
  end)
end

local function version_series(families, route)
  families.canary_rollbacks_total:with(route) -- at zero
  return remembered(function(version)
    return {
      ok = families.canary_runs_total:with(route, version, "ok"),
      failed = families.canary_runs_total:with(route, version, "failed"),
      seconds = families.canary_seconds:with(route, version),
    }
  end)
end

-- What did not run its handler.
local without_run = { duplicate = true, requeue = true }

-- Rare events: name -> function (families, fields).
local events = {
  canary_rollback = function(families, fields) families.canary_rollbacks_total:with(fields.route):inc() end,
  breaker_open = function(families, fields)
    families.breaker_open:with(fields.queue):set(1)
    families.breaker_openings_total:with(fields.queue):inc()
  end,
  breaker_closed = function(families, fields) families.breaker_open:with(fields.queue):set(0) end,
  handler_stuck = function(families, fields) families.handlers_stuck:with(fields.queue):set(fields.stuck) end,
  dedupe_away = function(families, fields) families.dedupe_away_total:with(fields.queue):inc() end,
  copy_failed = function(families, fields)
    -- The disposal gives the error itself, and tries again; the runner its text, and gives the original back.
    local what = tostring(fields.what):gsub(" ", "_")
    families.copies_failed_total:with(fields.queue, what,
      type(fields.error) == "string" and "given_back" or "tried_again"):inc()
  end,
}

--- `also`: another observer, which hears the same.
---@param families table<string, moonrabbit.metrics.Family>
---@param also table?
---@return table
function observer.new(families, also)
  local of_queue = queue_series(families)
  local of_route = remembered(function(route) return version_series(families, route) end)
  local self = {}

  function self.delivered(queue) of_queue(queue).delivered:inc() end

  function self.in_flight(queue, n) of_queue(queue).in_flight.value = n end

  function self.settled(queue, outcome, seconds)
    local series = of_queue(queue)
    series.outcome(outcome):inc()
    if not without_run[outcome] then series.seconds:observe(seconds) end
  end

  function self.failed(queue, failure) of_queue(queue).kind(failure.kind):inc() end

  function self.canary(route, version, ok, seconds)
    local series = of_route(route)(version)
    series[ok and "ok" or "failed"]:inc()
    series.seconds:observe(seconds)
  end

  function self.event(name, fields)
    local known = events[name]
    if known then known(families, fields) else families.events_total:with(name):inc() end
  end

  for name, theirs in pairs(guard(also or {})) do
    local ours = self[name]
    self[name] = ours and function(...)
      ours(...)
      return theirs(...)
    end or theirs
  end
  self.guarded = true
  return self
end

return observer
