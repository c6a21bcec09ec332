--- What an app tells, as metrics: the table for the option `observer` of mr.app.
--
-- The series of a queue are found once and kept; after that a message costs additions only.
-- @module moonrabbit.metrics.observer

local guard = require "moonrabbit.app.observer".guard

local observer = {}

-- A function (key) -> what make(key) gave first; and what it remembers: all[key] saves the call. Keys are what a
-- script names, so they are few.
local function remembered(make)
  local all = {}
  return function(key)
    local found = all[key]
    if not found then
      found = make(key)
      all[key] = found
    end
    return found
  end, all
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
    local series = {
      delivered = families.messages_delivered_total:with(queue),
      seconds = families.handler_seconds:with(queue),
      kind = remembered(function(kind) return families.handler_failures_total:with(queue, kind) end),
    }
    series.outcome, series.outcomes = remembered(function(outcome)
      return families.messages_settled_total:with(queue, outcome)
    end)
    return series
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

-- Whether its breaker holds back what comes: one that stops takes nothing any more.
local function is_held(runner)
  local breaker = runner.breaker
  return breaker and not runner.stopping and breaker.state ~= "closed"
end

--- What is in flight and stuck, and which breakers are open, is looked at when the page is written, and costs a message
--- nothing. One for all observers of a registry, for several runners may consume one queue: after a reload the old one
--- drains, and the new one may have no breaker.
---@param families table<string, moonrabbit.metrics.Family>
---@param registry moonrabbit.metrics.Registry
---@return fun(runner: moonrabbit.app.Runner) watch
function observer.runners(families, registry)
  local runners, queues = setmetatable({}, { __mode = "k" }), {}
  registry:collect(function()
    for _, series in pairs(queues) do
      series.in_flight.value, series.stuck.value = 0, 0
      if series.breaker then series.breaker:set(0) end
    end
    for runner in pairs(runners) do
      local series = queues[runner.queue]
      series.in_flight:inc(runner.in_flight)
      series.stuck:inc(runner.stuck)
      if is_held(runner) then series.breaker:set(1) end
    end
  end)
  return function(runner)
    local queue = runner.queue
    runners[runner] = true
    queues[queue] = queues[queue] or
      { in_flight = families.messages_in_flight:with(queue), stuck = families.handlers_stuck:with(queue) }
    if runner.breaker then queues[queue].breaker = families.breaker_open:with(queue) end
  end
end

local function publisher_series(families)
  return remembered(function(publisher)
    return {
      sent = families.publishes_total:with(publisher), seconds = families.publish_seconds:with(publisher),
      kind = remembered(function(kind) return families.publish_errors_total:with(publisher, kind) end),
    }
  end)
end

-- What a channel refuses before it sends anything.
local not_taken = { overflow = true, blocked = true }

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
  handler_stuck = function() end, -- as the runners tell
  dedupe_away = function(families, fields) families.dedupe_away_total:with(fields.queue):inc() end,
  copy_failed = function(families, fields)
    -- The disposal gives the error itself, and tries again; the runner its text, and gives the original back.
    local what = tostring(fields.what):gsub(" ", "_")
    families.copies_failed_total:with(fields.queue, what,
      type(fields.error) == "string" and "given_back" or "tried_again"):inc()
  end,
}

--- `also`: another observer, which hears the same. `watch`: what `observer.runners` gave.
---@param families table<string, moonrabbit.metrics.Family>
---@param watch fun(runner: moonrabbit.app.Runner)
---@param also table?
---@return table
function observer.new(families, watch, also)
  local of_queue, queues = queue_series(families)
  local of_route = remembered(function(route) return version_series(families, route) end)
  local of_publisher = publisher_series(families)
  local self = { runner = watch }

  function self.delivered(queue)
    local counter = (queues[queue] or of_queue(queue)).delivered
    counter.value = counter.value + 1
  end

  function self.settled(queue, outcome, seconds)
    local series = queues[queue] or of_queue(queue)
    local counter = series.outcomes[outcome] or series.outcome(outcome)
    counter.value = counter.value + 1
    if not without_run[outcome] then series.seconds:observe(seconds) end
  end

  function self.failed(queue, failure) of_queue(queue).kind(failure.kind):inc() end

  function self.canary(route, version, ok, seconds)
    local series = of_route(route)(version)
    series[ok and "ok" or "failed"]:inc()
    series.seconds:observe(seconds)
  end

  function self.published(app, seconds, err)
    local series = of_publisher(app)
    if not err then
      series.sent:inc()
      series.seconds:observe(seconds)
    else
      local kind = type(err) == "table" and err.kind or "unknown"
      if not not_taken[kind] then series.sent:inc() end
      series.kind(kind):inc()
    end
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
