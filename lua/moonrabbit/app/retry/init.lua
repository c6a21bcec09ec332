--- Retry policies: when a message whose handler failed is tried again, and when not any more.
--
--     retry.constant { delay = 5, attempts = 4 }
--     retry.linear { first = 1, step = 2, max = 30, attempts = 6 }
--     retry.exponential { first = 1, factor = 2, max = 60, attempts = 5, jitter = 0.2 }
--     retry.steps { 1, 5, 30, 300 }
--     retry.none()
--     retry.by_error { { kind = "timeout", retry.constant { delay = 1, attempts = 3 } }, otherwise = retry.none() }
--     function(msg, err, attempt) return attempt < 3 and 2 or nil end
--
-- A policy is called with the message, the failure and the number of the attempt that failed (1: the first),
-- and returns the seconds to wait before the next one, or nil: no more, the message becomes a dead letter.
-- `attempts` counts them all, the first included: 5 attempts are 4 retries.
--
-- Policies made here are tables that can be called. `policy:timetable()` tells what they would do,
-- `policy:describe()` says it in a line. What differs from run to run can be set on them by a spec:
-- `policy.random` (a function, 0 <= x < 1) and `policy.now` (seconds since 1970).
--
-- A failure (`err`) is a table: `message`, `kind` ("error", "timeout", "permanent", …), `permanent`,
-- `traceback`, `value` (what the handler threw or returned). On one with `permanent` no policy is asked.
-- @module moonrabbit.app.retry

local options = require "moonrabbit.options"
local failures = require "moonrabbit.app.failure"
local jitter = require "moonrabbit.app.retry.jitter"
local random = require "moonrabbit.random"
local protect = require "moonrabbit.protect"

local retry = {}

--- The longest delay: what a wait queue can hold (46 days).
retry.LONGEST = require "moonrabbit.app.steps".LONGEST

---@class moonrabbit.RetryFailure
---@field message string
---@field kind string
---@field permanent boolean?   trying again cannot help
---@field traceback string?
---@field value any            what was thrown or returned
---@field since number?        seconds since the message failed first in this process

---@alias moonrabbit.RetryFunction fun(msg: moonrabbit.Message, err: moonrabbit.RetryFailure, attempt: integer): number?

---@class moonrabbit.RetryPolicy
---@field attempts number                 how many in all
---@field within number?                  seconds after the first failure; later there is no more retry
---@field random fun(): number
---@field now fun(): number
---@operator call: number?
local Policy = {}
Policy.__index = Policy
Policy.__name = "moonrabbit.RetryPolicy"

-- ---- Kinds of options -------------------------------------------------------------------------------

local function delay(value)
  if type(value) ~= "number" or value ~= value or value < 0 or value > retry.LONGEST then
    return ("a number of seconds, 0 to %d"):format(retry.LONGEST)
  end
end

local function attempts(value)
  if value == math.huge then return end
  return options.integer(1, 1000000)(value) and "a number of attempts, 1 or more (math.huge: for ever)"
end

local function factor(value)
  if type(value) ~= "number" or value ~= value or value < 1 or value == math.huge then return "a number, 1 or more" end
end

local common = {
  attempts = attempts, jitter = jitter.valid, within = options.seconds, max = delay,
}

local function checked(what, given, extra, required)
  if type(given) ~= "table" then error(what .. ": options must be a table, not a " .. type(given), 3) end
  options.check(what, given, options.merge(common, extra), 3)
  for _, name in ipairs(required) do
    if given[name] == nil then error(("%s: option '%s' is missing"):format(what, name), 3) end
  end
  return given
end

-- base(attempt): seconds before jitter. text: its part of describe().
local function policy(given, text, base)
  return setmetatable({
    attempts = given.attempts or 5, within = given.within, max = given.max, jitter = given.jitter or "none",
    random = random.number, now = os.time, _base = base, _text = text,
  }, Policy)
end

-- ---- The policies -----------------------------------------------------------------------------------

---@class moonrabbit.RetryOptions
---@field attempts number?   how many in all, the first included; 5 by default, math.huge: for ever
---@field jitter (number|"full"|"equal"|"none")? "full": anything up to the delay; "equal": half of it and anything up to the other half; 0.2: 20 % more or less; "none" by default
---@field max number?        seconds; no delay is longer, jitter included
---@field within number?     seconds after the first failure, after which there is no more retry

---@class moonrabbit.RetryConstantOptions : moonrabbit.RetryOptions
---@field delay number  seconds

--- The same delay each time.
---@param opts moonrabbit.RetryConstantOptions
---@return moonrabbit.RetryPolicy
function retry.constant(opts)
  checked("retry.constant", opts, { delay = delay }, { "delay" })
  local seconds = opts.delay
  return policy(opts, ("constant %g s"):format(seconds), function() return seconds end)
end

---@class moonrabbit.RetryLinearOptions : moonrabbit.RetryOptions
---@field first number  seconds
---@field step number?  seconds more each time; as `first` by default

--- A delay that grows by the same amount each time.
---@param opts moonrabbit.RetryLinearOptions
---@return moonrabbit.RetryPolicy
function retry.linear(opts)
  checked("retry.linear", opts, { first = delay, step = delay }, { "first" })
  local first, step = opts.first, opts.step or opts.first
  return policy(opts, ("linear from %g s by %g s"):format(first, step), function(attempt)
    return first + (attempt - 1) * step
  end)
end

---@class moonrabbit.RetryExponentialOptions : moonrabbit.RetryOptions
---@field first number?   seconds; 1 by default
---@field factor number?  1 or more; 2 by default

--- A delay that is multiplied each time.
---@param opts moonrabbit.RetryExponentialOptions?
---@return moonrabbit.RetryPolicy
function retry.exponential(opts)
  opts = opts or {}
  checked("retry.exponential", opts, { first = delay, factor = factor }, {})
  local first, by = opts.first or 1, opts.factor or 2
  return policy(opts, ("exponential from %g s by %g"):format(first, by), function(attempt)
    return first * by ^ (attempt - 1)
  end)
end

-- The delays of a list, of which there must be one at least.
local function delay_list(given)
  local list, named = {}, {}
  for key, value in pairs(given) do
    if type(key) ~= "number" then named[key] = value end
  end
  for i = 1, (options.places(given)) do
    local seconds = given[i]
    if seconds == nil then error(("retry.steps: delay %d is missing (nil)"):format(i), 3) end
    local expected = delay(seconds)
    if expected then
      error(("retry.steps: delay %d must be %s, not %s"):format(i, expected, tostring(seconds)), 3)
    end
    list[i] = seconds
  end
  if #list == 0 then error("retry.steps: a list of delays is missing", 3) end
  return list, named
end

--- The delays of a list, one after the other; with more `attempts` than the list has delays, the last one goes
--- on. By default each is used once.
---@param opts moonrabbit.RetryOptions|number[] { 1, 5, 30, jitter = 0.2 }
---@return moonrabbit.RetryPolicy
function retry.steps(opts)
  if type(opts) ~= "table" then error("retry.steps: a list of delays is missing", 2) end
  local list, named = delay_list(opts)
  checked("retry.steps", named, {}, {})
  named.attempts = named.attempts or #list + 1
  return policy(named, "steps " .. table.concat(list, ", ") .. " s", function(attempt)
    return list[math.min(attempt, #list)]
  end)
end

--- No retry: the first failure makes a dead letter.
---@return moonrabbit.RetryPolicy
function retry.none()
  return policy({ attempts = 1 }, "no retry", function() return nil end)
end

-- ---- Asking a policy --------------------------------------------------------------------------------

-- How long ago the message failed first: as its headers tell, or, of retries in the process, the failure.
local function too_late(self, msg, err)
  if not self.within then return false end
  local first = require("moonrabbit.app.copy").first_failure(msg)
  local since = err and err.since or 0
  return math.max(first and self.now() - first or 0, since) > self.within
end

function Policy:__call(msg, err, attempt)
  if err and err.permanent then return nil end
  if attempt >= self.attempts or too_late(self, msg, err) then return nil end
  local base = self._base(attempt)
  if not base then return nil end
  local most = math.min(self.max or retry.LONGEST, retry.LONGEST)
  return math.min(jitter.apply(self.jitter, math.min(base, most), self.random), most)
end

---@class moonrabbit.RetryTime
---@field attempt integer   which attempt failed
---@field least number      seconds of delay, at least
---@field most number       and at most
---@field after number      seconds after the first failure, at most, when the next attempt begins

--- What this policy does after each failure, as far as that is the same for all messages.
---@param limit integer? how many lines at most; 20 by default
---@return moonrabbit.RetryTime[]
function Policy:timetable(limit)
  local list, after = {}, 0
  local most = math.min(self.max or retry.LONGEST, retry.LONGEST)
  for attempt = 1, math.min(limit or 20, self.attempts - 1) do
    local base = self._base(attempt)
    if not base then break end
    local low, high = jitter.range(self.jitter, math.min(base, most))
    low, high = math.min(low, most), math.min(high, most)
    if self.within and after > self.within then break end
    after = after + high
    list[attempt] = { attempt = attempt, least = low, most = high, after = after }
  end
  return list
end

--- The policy in a line.
---@return string
function Policy:describe()
  if self.attempts == 1 then return self._text end
  local parts = { self._text }
  if self.max then parts[#parts + 1] = ("at most %g s"):format(self.max) end
  parts[#parts + 1] = self.attempts == math.huge and "for ever" or ("%d attempts"):format(self.attempts)
  if self.jitter ~= "none" and self.jitter ~= 0 then parts[#parts + 1] = "jitter " .. tostring(self.jitter) end
  if self.within then parts[#parts + 1] = ("within %g s"):format(self.within) end
  return table.concat(parts, ", ")
end

Policy.__tostring = Policy.describe

--- Whether a value can be a policy: a function, or a table that can be called.
---@param value any
---@return boolean
function retry.is_policy(value)
  if type(value) == "function" then return true end
  local meta = type(value) == "table" and getmetatable(value)
  return meta and meta.__call ~= nil or false
end

--- Makes a policy that asks another one, chosen by the failure. See moonrabbit.app.retry.by_error.
---@param rules table
---@return moonrabbit.RetryPolicy
function retry.by_error(rules)
  local chosen = require("moonrabbit.app.retry.by_error").new(retry, rules, 2)
  return chosen
end

-- ---- Deciding ---------------------------------------------------------------------------------------

local function nonsense(text, failure)
  return nil, "retry policy", {
    kind = "policy", permanent = true, value = failure.value, traceback = failure.traceback,
    message = ("%s (the failure it was asked about: %s)"):format(text, tostring(failure.message)),
  }
end

--- Asks a policy what becomes of a message that failed: the seconds to wait; or nil, a reason in a word or two, and
--- the failure to tell of. A policy that throws or returns nonsense is itself a failure, which takes the place of the
--- handler's and tells of both.
---@param policy_of moonrabbit.RetryFunction|moonrabbit.RetryPolicy|nil none: no retry
---@param msg moonrabbit.Message
---@param failure moonrabbit.RetryFailure
---@param attempt integer the attempt that failed, from 1
---@return number|nil delay, string? reason, moonrabbit.RetryFailure? failure
function retry.decide(policy_of, msg, failure, attempt)
  if failure.permanent then return nil, "permanent", failure end
  if policy_of == nil then return nil, "no retry", failure end
  local ok, seconds = protect(policy_of, msg, failure, attempt)
  if not ok then return nonsense("the retry policy threw: " .. failures.text(seconds), failure) end
  if seconds == nil then return nil, "attempts", failure end
  local expected = delay(seconds)
  if not expected then return seconds end
  return nonsense(("the retry policy returned %s (%s), not %s or nil"):format(failures.text(seconds), type(seconds),
    expected), failure)
end

return retry
