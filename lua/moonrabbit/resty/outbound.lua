--- What a worker publishes: a bounded queue that every phase may put messages into (`outbound/queue.lua`), and the timer
-- that sends them (`outbound/session.lua`).
-- @module moonrabbit.resty.outbound

local Keeper = require "moonrabbit.resty.keeper"
local errors = require "moonrabbit.errors"
local jobs = require "moonrabbit.resty.outbound.jobs"
local leaving = require "moonrabbit.resty.outbound.leaving"
local life = require "moonrabbit.resty.life"
local publish = require "moonrabbit.resty.outbound.publish"
local queue = require "moonrabbit.resty.outbound.queue"
local semaphore = require "ngx.semaphore"
local session = require "moonrabbit.resty.outbound.session"

-- A channel counts its window from the oldest unconfirmed message, and holds a place for each message since.
local WINDOW = 65536

---@class moonrabbit.resty.Outbound
local Outbound = { publish = publish.confirmed, publish_async = publish.async, run = jobs.run }
Outbound.__index = Outbound

--- config: `name`, `entries`, `bytes`, `linger`, `calls` (functions that run at once), `setup`, `connect`, `backoff`,
--- `exit_timeout`, `watch`.
---@param config table
---@return moonrabbit.resty.Outbound
function Outbound.new(config)
  local self = setmetatable({
    config = config, entries = config.entries,
    window = math.max(WINDOW, 4 * config.entries), -- of a channel: more than the queue holds
    sent_to = 1,           -- those below it were sent at least once
    sending = 0,           -- the one that waits for room in the output
    suspects = 1,          -- those below it go one at a time
    wake = semaphore.new(), spare = {},
    sleeping = nil,        -- what the sender may be woken by: "any" message, or an "urgent" one
    urgent = false,        -- somebody waits for a message that is not sent yet
    jobs = {}, running = 0, -- functions for the connection
    published = 0, confirmed = 0, overflows = 0, timeouts = 0, resent = 0, failures = {},
    unheard = 0, unheard_at = -math.huge,
    metrics = nil, seconds = nil, -- moonrabbit.resty.metrics: who is told of changes, and of how long a confirm took
  }, Outbound)
  queue.init(self)
  self.keeper = Keeper.new {
    name = config.name, connect = config.connect, backoff = config.backoff, exit_timeout = config.exit_timeout,
    watch = config.watch,
    serve = function(conn, keeper) return session.serve(self, conn, keeper) end,
    wanted = function() return self:busy() end,
    failed = function(err) session.connecting_failed(self, err) end,
    abandon = function() leaving.abandon(self) end,
  }
  life.on_exit(function() self:rouse() end)
  return self
end

--- Whether there is anything to stay for.
function Outbound:busy() return self.count > 0 or #self.jobs > 0 or self.running > 0 end

--- Wakes the sender, whatever it waits for.
function Outbound:rouse()
  if self.sleeping then
    self.sleeping = nil
    self.wake:post(1)
  end
end

function Outbound:error(kind, message, temporary)
  return errors.new { kind = kind, message = message, temporary = temporary, endpoint = self.endpoint }
end

--- Counters since the worker began, and what there is now.
---@return table
function Outbound:stats()
  local failed = {}
  for kind, n in pairs(self.failures) do failed[kind] = n end
  return {
    state = self.keeper.state == "open" and "open" or "connecting", reason = self.keeper.failure,
    published = self.published, confirmed = self.confirmed, failed = failed, overflows = self.overflows,
    timeouts = self.timeouts, resent = self.resent, sessions = self.keeper.sessions,
    queued = self.count - self.in_flight, in_flight = self.in_flight, bytes = self.bytes, calls = self.running,
  }
end

return Outbound
