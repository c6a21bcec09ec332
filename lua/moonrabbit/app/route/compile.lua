--- Compiles a route: one function of a message that finds its target.
--
-- Rules by key that stand next to each other become one trie, so that it does not matter how many they are;
-- the other conditions are asked in their order. Targets are made once. A target is the user's own
-- function, or a table with `run(self, message, app, job)`, which gives what a handler returns.
-- @module moonrabbit.app.route.compile

local core = require "moonrabbit.core"
local Trie = require "moonrabbit.app.route.trie"
local failure = require "moonrabbit.app.failure"
local copy = require "moonrabbit.app.copy"
local headers = require "moonrabbit.app.headers"
local outcome = require "moonrabbit.app.outcome"
local route = require "moonrabbit.app.route"

local Route = route.Route
local type = type
local published_with = copy.routing_key -- a retry's own key is the name of its queue
local key_without, KEY_HEADER = core.key_without, headers.routing_key -- the same for what is no copy, in one call

local compile = {}

--- The failure of a message that no rule takes.
function compile.no_route(message)
  return failure.new("permanent", ("no route takes the message: its routing key is '%s'")
    :format(copy.routing_key(message)))
end

-- ---- Targets ----------------------------------------------------------------------------------------

--- Runs a target; what it returns is what a handler would.
local function run(target, message, app, job)
  if type(target) == "function" then return target(message, app) end
  return target:run(message, app, job)
end

local Forward = { __index = {} }

function Forward.__index:run(message, app)
  return app:forward(message, self.exchange, self.key, self.opts)
end

local Publish = { __index = {} }

function Publish.__index:run(message, app)
  local body, opts = self.make(message)
  if type(body) ~= "string" then
    return nil, "the function of route.publish gave a " .. type(body) .. " for the body, and no string"
  end
  local all = { exchange = self.exchange, routing_key = self.key }
  for name, value in pairs(opts or {}) do all[name] = value end
  return app:publish(body, all)
end

local Outcome = { __index = {} }

function Outcome.__index:run() return self.outcome end

-- Several targets, one after the other, chosen before the first of them runs. The first that fails, or that asks for
-- something else than to be acked, decides; dropped is what all of them drop.
local Fan = { __index = {} }

local function results(...) return select("#", ...), ... end

function Fan.__index:run(message, app, job)
  local taken, dropped = 0, 0
  for i = 1, #self do
    local failed, asked = failure.of_results(results(run(self[i], message, app, job)))
    if failed then return nil, failed end
    if asked and asked.action ~= "drop" then return asked end
    if asked then dropped = dropped + 1 end
    taken = taken + 1
  end
  if taken == 0 then return nil, compile.no_route(message) end
  if dropped == taken then return outcome.drop() end
  return true
end

-- ---- Compiling --------------------------------------------------------------------------------------

-- A compiled target is { constant = target } or { resolve = function(message, job) -> target | nil }.
local compile_target

-- Adds what a compiled target is for a message, if it takes it.
local function add(found, target, message, job)
  local resolved = target.constant or target.resolve(message, job)
  if resolved then found[#found + 1] = resolved end
end

-- One that takes nothing is a failure, and no condition that does not hold.
local function compile_list(list, context)
  local targets, fan = {}, setmetatable({}, Fan)
  for i = 1, #list do
    targets[i] = compile_target(list[i], context)
    fan[#fan + 1] = targets[i].constant
  end
  if #fan == #list then
    context.describe[fan] = "a list of " .. #list .. " targets"
    return { constant = fan }
  end
  return {
    resolve = function(message, job)
      local found = setmetatable({}, Fan)
      for i = 1, #targets do add(found, targets[i], message, job) end
      return found
    end,
  }
end

local function run_of_keys(rules, at, context)
  local trie, targets = Trie.new(), {}
  while rules[at] and rules[at].kind == "key" do
    targets[#targets + 1] = compile_target(rules[at].target, context)
    trie:add(rules[at].pattern, #targets)
    at = at + 1
  end
  return trie, targets, at
end

local function holds_of(rule)
  if rule.kind == "otherwise" then return function() return true end end
  if rule.holds then return rule.holds end
  local test = rule.test
  if rule.on == "headers" then return function(message) return test(message.headers) end end
  return function(message) return test(message.properties) end
end

local function keys_step(trie, targets)
  local constants = {}
  for i = 1, #targets do constants[i] = targets[i].constant or false end
  return function(message, job)
    local key = key_without(message, KEY_HEADER) or published_with(message)
    local rule = trie.known[key]
    if rule == nil then rule = trie:first(key, 0) end
    while rule do
      local target = constants[rule] or targets[rule].resolve(message, job)
      if target then return target end
      rule = trie:first(key, rule)
    end
  end
end

local function rule_step(holds, target)
  local constant, resolve = target.constant, target.resolve
  if constant then
    return function(message)
      if holds(message) then return constant end
    end
  end
  return function(message, job)
    if holds(message) then return resolve(message, job) end
  end
end

-- A list of rules may have been changed since it was checked.
local function check_rules(node)
  for i = 1, #node.rules do
    local rule = node.rules[i]
    if getmetatable(rule) ~= Route or not rule.is_rule then
      error({ cycle = true, ("rule %d of %s is no rule any more"):format(i, tostring(node)) }, 0)
    end
  end
  return node.rules
end

local function compile_first(rules, context)
  local steps, at = {}, 1
  while rules[at] do
    local trie, targets, after = run_of_keys(rules, at, context)
    if after > at then
      steps[#steps + 1] = keys_step(trie, targets)
      at = after
    else
      steps[#steps + 1] = rule_step(holds_of(rules[at]), compile_target(rules[at].target, context))
      at = at + 1
    end
  end
  local count = #steps
  if count == 1 then return { resolve = steps[1] } end
  return {
    resolve = function(message, job)
      for i = 1, count do
        local target = steps[i](message, job)
        if target then return target end
      end
    end,
  }
end

-- What takes the message of every run of keys and every other rule, in order.
local function compile_all(rules, context)
  local steps, at, otherwise = {}, 1, nil
  while rules[at] do
    local trie, targets, after = run_of_keys(rules, at, context)
    if after > at then
      steps[#steps + 1] = { trie = trie, targets = targets }
      at = after
    elseif rules[at].kind == "otherwise" then
      otherwise = compile_target(rules[at].target, context)
      at = at + 1
    else
      steps[#steps + 1] = { holds = holds_of(rules[at]), target = compile_target(rules[at].target, context) }
      at = at + 1
    end
  end
  return {
    resolve = function(message, job)
      local found = setmetatable({}, Fan)
      for i = 1, #steps do
        local step = steps[i]
        if not step.trie then
          if step.holds(message) then add(found, step.target, message, job) end
        else
          for _, rule in ipairs(step.trie:every(published_with(message))) do
            add(found, step.targets[rule], message, job)
          end
        end
      end
      if #found == 0 then return otherwise and (otherwise.constant or otherwise.resolve(message, job)) end
      if #found == 1 then return found[1] end
      return found
    end,
  }
end

local function compile_canary(node, context)
  local canary = node.canary
  local versions = {
    stable = compile_target(node.stable, context), candidate = compile_target(node.candidate, context),
  }
  context.canaries[#context.canaries + 1] = canary
  return {
    resolve = function(message, job)
      local version = canary:choose(message)
      local target = versions[version].constant or versions[version].resolve(message, job)
      if target and job then
        local trials = job.trials or {}
        trials[#trials + 1], trials[#trials + 2] = canary, version
        job.trials = trials
      end
      return target
    end,
  }
end

local compilers = {
  first = function(node, context) return compile_first(check_rules(node), context) end,
  all = function(node, context) return compile_all(check_rules(node), context) end,
  canary = compile_canary,
  forward = function(node, context)
    context.sends[#context.sends + 1] = node
    return { constant = setmetatable({ exchange = node.exchange, key = node.key, opts = node.opts }, Forward) }
  end,
  publish = function(node, context)
    context.sends[#context.sends + 1] = node
    local meta = node.make and Publish or Forward
    return { constant = setmetatable({ exchange = node.exchange, key = node.key, make = node.make, opts = node.opts },
      meta) }
  end,
  dead_letter = function(node) return { constant = setmetatable({ outcome = node.outcome }, Outcome) } end,
  drop = function(node) return { constant = setmetatable({ outcome = node.outcome }, Outcome) } end,
}

local function name_of(node)
  if type(node) == "function" then
    local info = debug.getinfo(node, "S")
    return ("the handler at %s:%d"):format(info.short_src, info.linedefined)
  end
  if node.exchange then
    return ("route.%s to '%s' with the key %s (%s)"):format(node.kind, node.exchange,
      node.key and "'" .. node.key .. "'" or "of the message", node.where)
  end
  if node.outcome then return ("%s (%s)"):format(tostring(node.outcome), node.where) end
  return tostring(node)
end

function compile_target(target, context)
  if type(target) == "function" then
    context.describe[target] = name_of(target)
    return { constant = target }
  end
  if context.path[target] then
    error({ cycle = true, "a route leads back to itself: " .. (getmetatable(target) == Route and tostring(target)
      or "a list of targets") }, 0)
  end
  local problem = route.no_target(target) -- a list that was changed since
  if problem then error({ cycle = true, problem }, 0) end
  context.path[target] = true
  local compiled
  if getmetatable(target) == Route then
    compiled = compilers[target.kind](target, context)
    if compiled.constant then context.describe[compiled.constant] = name_of(target) end
  else
    compiled = compile_list(target, context)
  end
  context.path[target] = nil
  return compiled
end

compile.run = run

---@class moonrabbit.app.CompiledRoute
---@field resolve fun(message: moonrabbit.Message, job: table?): any  the target, or nil
---@field canaries moonrabbit.app.Canary[]
---@field sends table[]                where route.publish and route.forward send
---@field describe table<any, string>  target -> words

--- Compiles a target. nil and what is wrong, for a route that leads back to itself.
---@param target any
---@return moonrabbit.app.CompiledRoute|nil, string?
function compile.compile(target)
  local context = { path = {}, canaries = {}, sends = {}, describe = {} }
  local ok, compiled = pcall(compile_target, target, context)
  if not ok then
    if type(compiled) == "table" and compiled.cycle then return nil, compiled[1] end
    error(compiled, 0)
  end
  local constant = compiled.constant
  return {
    resolve = compiled.resolve or function() return constant end,
    constant = constant, canaries = context.canaries, sends = context.sends, describe = context.describe,
  }
end

return compile
