--- Canary: a new version of a handler gets a part of the messages, and loses it when it does worse.
--
--     route.canary {
--       stable = v1, candidate = v2,
--       weight = 10,                                   -- percent of the messages
--       sticky = function(msg) return msg.headers.customer end,
--       window = 60,                                   -- seconds over which both are compared
--       rollback = { error_rate = 0.05, latency = 2, min = 100 },
--     }
--
-- Rolled back is when the candidate has had at least `min` messages within the window, and its share of failures
-- is more than `error_rate` above the stable version's, or its 95th percentile of time more than
-- `latency` times the stable version's. From then on every message is the stable version's, until the script is
-- changed: the state survives a reload as long as `name` and `version` stay the same.
--
-- A failure is a handler that throws, fails, times out, or asks for a retry or the dead letters. A message
-- keeps its version while it is retried in the process; on the broker's ladder only `sticky` keeps it.
-- @module moonrabbit.app.route.canary

local options = require "moonrabbit.options"
local chance = require "moonrabbit.random"
local Window = require "moonrabbit.app.route.window"

---@class moonrabbit.CanaryOptions
---@field stable any             the target in use
---@field candidate any          the target to be tried
---@field weight number          percent of the messages for the candidate, 0 to 100
---@field name string?           in metrics, events and saved state; where it stands in the script by default
---@field version string?        of the candidate: another one begins anew after a reload
---@field sticky (string|fun(message: moonrabbit.Message): any)?  a header's name, or a function: messages of one key go to one version
---@field window number?         seconds; 60 by default
---@field rollback moonrabbit.CanaryRollbackOptions?  without it the candidate stays, whatever it does
---@field on_rollback fun(report: table)?  called in a task of its own
---@field random (fun(): number)?  from 0 to 1; moonrabbit.random's by default

---@class moonrabbit.CanaryRollbackOptions
---@field error_rate number?  how much higher the candidate's share of failures may be, 0 to 1
---@field latency number?     how many times the stable version's 95th percentile its own may be, 1 or more
---@field min integer?        messages of the candidate before it is judged; 100 by default

---@class moonrabbit.app.Canary
local Canary = {}
Canary.__index = Canary

local function percent(value)
  if type(value) ~= "number" or not (value >= 0 and value <= 100) then return "a number of percent, 0 to 100" end
end

local function share(value)
  if type(value) ~= "number" or not (value >= 0 and value <= 1) then return "a share from 0 to 1" end
end

local function positive(value)
  if type(value) ~= "number" or not (value > 0 and value < math.huge) then return "a number of seconds over 0" end
end

local canary_options = {
  stable = options.any, candidate = options.any, weight = percent, name = options.shortstr,
  version = options.shortstr, sticky = options.either(options.shortstr, options.callback), window = positive,
  rollback = options.table, on_rollback = options.callback, random = options.callback,
}
local rollback_options = { error_rate = share, latency = options.number(1), min = options.integer(1, 1e9) }

--- One; used by route.canary.
---@package
function Canary.new(spec, no_target, level)
  level = level + 1
  if type(spec) ~= "table" then error("route.canary: a table of options expected, not a " .. type(spec), level) end
  options.check("route.canary", spec, canary_options, level)
  if spec.weight == nil then error("route.canary: the weight is missing: percent of the messages", level) end
  for _, version in ipairs { "stable", "candidate" } do
    local problem = no_target(spec[version])
    if problem then error("route.canary: " .. version .. ": " .. problem, level) end
  end
  local limits = spec.rollback
  if limits then
    options.check("route.canary: rollback", limits, rollback_options, level)
    if not limits.error_rate and not limits.latency then
      error("route.canary: rollback names neither error_rate nor latency", level)
    end
  end
  local sticky = spec.sticky
  if type(sticky) == "string" then
    sticky = function(message) return message.headers[spec.sticky] end
  end
  local window = spec.window or 60
  return setmetatable({
    name = spec.name, version = spec.version, weight = spec.weight, sticky = sticky, window = window,
    limits = limits, min = limits and limits.min or 100, on_rollback = spec.on_rollback,
    random = spec.random or chance.number, rolled_back = false,
    stable = Window.new(window), candidate = Window.new(window),
  }, Canary)
end

-- ---- Choosing ---------------------------------------------------------------------------------------

-- A number from 0 up to 100, always the same for a key, and another for each canary.
local function place(name, key)
  local hash = 5381
  local text = name .. "\0" .. tostring(key)
  for i = 1, #text do hash = (hash * 8191 + text:byte(i)) % 4294967291 end
  return (hash * 1000003 % 4294967291) % 10000 / 100
end

--- "stable" or "candidate". A message without a sticky key is stable.
---@param message moonrabbit.Message
---@return "stable"|"candidate"
function Canary:choose(message)
  if self.rolled_back or self.weight == 0 then return "stable" end
  if self.sticky then
    local key = self.sticky(message)
    if key == nil then return "stable" end
    return place(self.name, key) < self.weight and "candidate" or "stable"
  end
  return self.random() * 100 < self.weight and "candidate" or "stable"
end

-- ---- Judging ----------------------------------------------------------------------------------------

-- The 95th percentiles are looked at for one message of so many.
local LOOK_EVERY = 16

local function worse(self)
  local stable, candidate, limits = self.stable, self.candidate, self.limits
  if candidate.count < self.min then return nil end
  local rate, base = candidate:error_rate(), stable:error_rate()
  if limits.error_rate and rate - base > limits.error_rate then
    return ("it fails in %.1f %% of %d, the stable version in %.1f %%"):format(rate * 100, candidate.count, base * 100)
  end
  if limits.latency and stable.count > 0 and (candidate.count == self.min or candidate.count % LOOK_EVERY == 0) then
    local slow, usual = candidate:quantile(0.95), stable:quantile(0.95)
    if slow > usual * limits.latency then
      return ("95 %% of it take up to %.3g s, of the stable version %.3g s"):format(slow, usual)
    end
  end
end

--- Notes how a run went. A table that tells why, when that was the one too many.
---@param version "stable"|"candidate"
---@param ok boolean
---@param seconds number
---@param now number
---@return table? report route, version, reason, and both versions' count, failures and p95
function Canary:record(version, ok, seconds, now)
  self[version]:add(ok, seconds, now)
  if not self.limits or self.rolled_back or version ~= "candidate" then return nil end
  self.stable:advance(now)
  local reason = worse(self)
  if not reason then return nil end
  self.rolled_back = reason
  local report = { route = self.name, version = self.version, reason = reason }
  for _, which in ipairs { "stable", "candidate" } do
    local window = self[which]
    report[which] = { count = window.count, failures = window.failures, p95 = window:quantile(0.95) }
  end
  return report
end

-- ---- State ------------------------------------------------------------------------------------------

--- What a reload carries over.
---@return table
function Canary:state()
  return {
    name = self.name, version = self.version, window = self.window, rolled_back = self.rolled_back,
    stable = self.stable, candidate = self.candidate,
  }
end

--- Takes over a state, when it is of the same canary and the same version.
---@param state table
---@return boolean taken
function Canary:restore(state)
  if state.name ~= self.name or state.version ~= self.version then return false end
  self.rolled_back = state.rolled_back
  if state.window == self.window then self.stable, self.candidate = state.stable, state.candidate end
  return true
end

return Canary
