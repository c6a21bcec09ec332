--- Routing: which handler, or what else, a message is for.
--
--     route = route.first {
--       route.key("order.*.created", function(msg) … end),
--       route.header({ type = "refund" }, function(msg) … end),
--       route.json("customer.country", "de", route.forward("orders.de")),
--       route.when(function(msg) return #msg.body == 0 end, route.drop()),
--       route.otherwise(route.dead_letter "no route"),
--     }
--
-- A rule is a condition and a target. Targets: a handler, `route.publish`, `route.forward`, `route.dead_letter`,
-- `route.drop`, `route.canary`, another `route.first` or `route.all`, or a list of targets, which all get
-- the message. A nested route in which no rule takes the message counts as a condition that does not hold:
-- the next rule is asked. A message that nothing takes is a permanent failure.
--
-- Mistakes throw where they stand. Nothing is compiled before `mr.app` gets the whole: moonrabbit.app.route.compile.
-- @module moonrabbit.app.route

local options = require "moonrabbit.options"
local match = require "moonrabbit.app.route.match"
local outcome = require "moonrabbit.app.outcome"

---@class moonrabbit.app.Route a rule, a target or a table of rules
---@field kind string
---@field where string file and line
local Route = {}
Route.__index = Route
Route.__name = "moonrabbit.app.Route"

function Route.__tostring(self) return "route." .. self.kind .. " (" .. self.where .. ")" end

local route = { Route = Route, absent = match.absent, present = match.present }

-- Called in no tail call: the line is that of the caller's caller.
local function make(kind, fields)
  local info = debug.getinfo(3, "Sl") or { short_src = "?", currentline = 0 }
  fields.kind, fields.where = kind, info.short_src .. ":" .. info.currentline
  return setmetatable(fields, Route)
end

-- What is wrong with a target, or nil.
local function no_target(target, depth)
  depth = (depth or 0) + 1
  if depth > 100 then return "a list of targets leads back to itself" end
  local kind = type(target)
  if kind == "function" or getmetatable(target) == Route and not target.is_rule then return nil end
  local expected = "a handler function, a route.… target or a list of them"
  if getmetatable(target) == Route then return "the target is a rule, " .. tostring(target) .. ": " .. expected end
  if kind == "table" and getmetatable(target) == nil and #target > 0 then
    for i = 1, #target do
      local problem = no_target(target[i], depth)
      if problem then return depth > 50 and problem or "in the list, at " .. i .. ": " .. problem end
    end
    return nil
  end
  return "the target is " .. (target == nil and "missing (nil)" or "a " .. kind) .. ": " .. expected .. " expected"
end

local function check_target(what, target)
  local problem = no_target(target)
  if problem then error(what .. ": " .. problem, 3) end
  return target
end

local function check_word(what, name, value)
  if type(value) ~= "string" then error(what .. ": " .. name .. " must be a string, not a " .. type(value), 3) end
  if #value > 255 then error(what .. ": " .. name .. " is longer than 255 bytes", 3) end
end

-- ---- Tables of rules --------------------------------------------------------------------------------

local function check_rules(what, rules)
  if type(rules) ~= "table" or getmetatable(rules) ~= nil then
    error(what .. ": a list of rules expected, not a " .. type(rules), 3)
  end
  if next(rules) == nil then error(what .. ": there are no rules", 3) end
  local count = 0
  for _ in pairs(rules) do count = count + 1 end
  for i = 1, count do
    local rule = rules[i]
    if rule == nil then
      error(("%s: rule %d is missing (nil), or the list has named fields"):format(what, i), 3)
    end
    if getmetatable(rule) ~= Route or not rule.is_rule then
      error(("%s: rule %d is a %s, and no rule: route.otherwise(target) takes every message"):format(what, i,
        getmetatable(rule) == Route and tostring(rule) or type(rule)), 3)
    end
    if rule.kind == "otherwise" and i < count then
      error(("%s: rule %d is an otherwise, so rule %d can never be asked"):format(what, i, i + 1), 3)
    end
  end
end

--- The first rule that holds takes the message.
---@param rules moonrabbit.app.Route[]
---@return moonrabbit.app.Route
function route.first(rules)
  check_rules("route.first", rules)
  return (make("first", { rules = rules }))
end

--- Every rule that holds gets the message, one after the other; `otherwise` where none does. The first
--- failure ends it, and a retry begins anew: handlers may see a message again that they had.
---@param rules moonrabbit.app.Route[]
---@return moonrabbit.app.Route
function route.all(rules)
  check_rules("route.all", rules)
  return (make("all", { rules = rules }))
end

-- ---- Rules ------------------------------------------------------------------------------------------

--- Holds where the routing key matches an AMQP topic pattern: `*` is one word, `#` any number of them.
---@param pattern string
---@param target any
---@return moonrabbit.app.Route
function route.key(pattern, target)
  check_word("route.key", "the pattern", pattern)
  for word in pattern:gmatch "[^.]+" do
    if #word > 1 and word:find "[*#]" then
      error(("route.key: '%s' in the pattern '%s': * and # stand for whole words"):format(word, pattern), 2)
    end
  end
  return (make("key", { is_rule = true, pattern = pattern, target = check_target("route.key", target) }))
end

local function check_spec(what, spec, valid)
  if type(spec) ~= "table" or next(spec) == nil then
    error(what .. ": a table { name = value, … } expected" .. (type(spec) == "table" and ", and it is empty" or
      ", not a " .. type(spec)), 4)
  end
  for name in pairs(spec) do
    if type(name) ~= "string" then error(what .. ": a name is a " .. type(name) .. ", and no string", 4) end
    if valid and not valid[name] then
      local hint = options.nearest(name, valid)
      error(("%s: there is no property '%s'%s"):format(what, name,
        hint and " (did you mean '" .. hint .. "'?)" or ""), 4)
    end
  end
end

local function table_rule(what, kind, spec, target, any, valid)
  check_spec(what, spec, valid)
  local test, name, expected = match.compile(spec, any)
  if not test then error(("%s: '%s' must be %s, not a %s"):format(what, name, expected, type(spec[name])), 3) end
  local problem = no_target(target)
  if problem then error(what .. ": " .. problem, 3) end
  return { is_rule = true, test = test, any = any, spec = spec, target = target, on = kind }
end

--- Holds where every header is as given: a value, a predicate of the value, route.absent or route.present.
---@param headers table<string, any>
---@param target any
---@return moonrabbit.app.Route
function route.header(headers, target)
  return (make("header", table_rule("route.header", "headers", headers, target, false)))
end

--- Holds where one of the headers is as given.
---@param headers table<string, any>
---@param target any
---@return moonrabbit.app.Route
function route.header_any(headers, target)
  return (make("header_any", table_rule("route.header_any", "headers", headers, target, true)))
end

local property_names = {}
for name in pairs(options.publish) do
  property_names[name] = name ~= "exchange" and name ~= "routing_key" and name ~= "mandatory" and name ~= "persistent"
    and name ~= "headers" or nil
end

--- Holds where every property is as given: content_type, type, app_id, priority, …
---@param properties table<string, any>
---@param target any
---@return moonrabbit.app.Route
function route.property(properties, target)
  return (make("property", table_rule("route.property", "properties", properties, target, false, property_names)))
end

--- Holds where a field of the body, which is JSON, is as given. null is as good as absent. Needs lua-cjson.
---@param path string|table "customer.country", "items.1.sku"; or a list of names and places
---@param wanted any a value, a predicate of the value, route.absent or route.present
---@param target any
---@return moonrabbit.app.Route
function route.json(path, wanted, target)
  local json = require "moonrabbit.app.route.json"
  local loaded, problem = json.load()
  if not loaded then error("route.json: " .. problem, 2) end
  if type(path) ~= "string" and type(path) ~= "table" or #path == 0 then
    error("route.json: the path of a field expected, such as \"customer.country\"", 2)
  end
  local words = json.path(path)
  local test, expected = match.value(wanted)
  if not test then error("route.json: the wanted value must be " .. expected .. ", not a " .. type(wanted), 2) end
  check_target("route.json", target)
  local function holds(message) return test(json.field(message, words)) end
  return (make("json", { is_rule = true, holds = holds, path = words, wanted = wanted, target = target }))
end

--- Holds where a function of the message says so.
---@param predicate fun(message: moonrabbit.Message): any
---@param target any
---@return moonrabbit.app.Route
function route.when(predicate, target)
  if type(predicate) ~= "function" then
    error("route.when: a predicate function expected, not a " .. type(predicate), 2)
  end
  return (make("when", { is_rule = true, holds = predicate, target = check_target("route.when", target) }))
end

--- Holds always: the last rule.
---@param target any
---@return moonrabbit.app.Route
function route.otherwise(target)
  return (make("otherwise", { is_rule = true, target = check_target("route.otherwise", target) }))
end

-- ---- Targets ----------------------------------------------------------------------------------------

local forward_options = {
  set = options.table, remove = options.table, remove_properties = options.table, mandatory = options.boolean,
}

--- Sends the message on, byte for byte, to an exchange ("": the key is a queue's name), and acks it once
--- that is confirmed. No queue takes it: a failure.
---@param exchange string
---@param key string? the message's own by default
---@param opts moonrabbit.ForwardOptions? set, remove, remove_properties, mandatory
---@return moonrabbit.app.Route
function route.forward(exchange, key, opts)
  check_word("route.forward", "the exchange", exchange)
  if key ~= nil then check_word("route.forward", "the routing key", key) end
  opts = options.check("route.forward", opts, forward_options)
  return (make("forward", { exchange = exchange, key = key, opts = opts }))
end

--- Publishes what `make_message` makes of the message, and acks it once that is confirmed; without it, the message
--- itself, as route.forward.
---@param exchange string
---@param key string
---@param make_message (fun(message: moonrabbit.Message): string, moonrabbit.PublishOptions?)? the body, and options for publish
---@return moonrabbit.app.Route
function route.publish(exchange, key, make_message)
  check_word("route.publish", "the exchange", exchange)
  check_word("route.publish", "the routing key", key)
  if make_message ~= nil and type(make_message) ~= "function" then
    error("route.publish: a function that makes the body expected, not a " .. type(make_message), 2)
  end
  return (make("publish", { exchange = exchange, key = key, make = make_message, opts = {} }))
end

--- Parks the message in the consumer's dead-letter queue.
---@param reason string?
---@return moonrabbit.app.Route
function route.dead_letter(reason)
  if reason ~= nil and type(reason) ~= "string" then
    error("route.dead_letter: the reason must be a string, not a " .. type(reason), 2)
  end
  return (make("dead_letter", { outcome = outcome.dead_letter(reason or "its route says so") }))
end

--- Acks the message and forgets it.
---@return moonrabbit.app.Route
function route.drop()
  return (make("drop", { outcome = outcome.drop() }))
end

--- Sends a part of the messages to a new version of a handler, and takes it back when that does worse.
--- See moonrabbit.app.route.canary.
---@param spec moonrabbit.CanaryOptions
---@return moonrabbit.app.Route
function route.canary(spec)
  local canary = require("moonrabbit.app.route.canary").new(spec, no_target, 2)
  local made = make("canary", { canary = canary, stable = spec.stable, candidate = spec.candidate })
  canary.name = canary.name or made.where
  return made
end

route.no_target = no_target

return route
