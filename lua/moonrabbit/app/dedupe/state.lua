--- Idempotence by a business state machine: a message is a step of something that has a state of its own, and is
--- handled only where that state allows the step.
--
--     local orders = mr.dedupe.state {
--       transitions = { [""] = { "created" }, created = { "paid", "cancelled" }, paid = { "shipped" } },
--       current = function(id) return db.state_of(id) end,                     -- nil or "": not there yet
--       move = function(id, from, to) return db.compare_and_set(id, from, to) end,
--     }
--     -- of a consumer
--     dedupe = { store = orders, key = orders.key(function(msg) return msg.headers.order, msg.headers.step end) }
--
-- A step that the state has behind it is a duplicate, and acked. One whose time has not come (`shipped` while the order
-- is only `created`) waits, as a message that somebody else is handling does; one that can never come any more
-- (`shipped` of a cancelled order) is refused, which an app takes for a permanent failure. After the handler, `move` is
-- called: it is to change the state only where it still is `from`, and answers whether it was.
-- @module moonrabbit.app.dedupe.state

local errors = require "moonrabbit.errors"
local options = require "moonrabbit.options"
local protect = require "moonrabbit.protect"

local state = {}

---@class moonrabbit.dedupe.State
local Store = {}
Store.__index = Store

local SEPARATOR = "\31"

---@class moonrabbit.dedupe.StateOptions
---@field transitions table<string, string[]>  state -> the states that may follow; "" is that of something new
---@field current fun(id: string): string|nil, any  the state of something now; nil or "": it is new; nil, err: it cannot be told
---@field move fun(id: string, from: string, to: string): boolean|nil, any  true: moved; false: it was no longer `from`; nil, err: it cannot be told
---@field now (fun(): number)?  a clock, in seconds; the runtime's by default

local store_options = {
  transitions = options.table, current = options.callback, move = options.callback, now = options.callback,
}

-- Which states can be reached from each, by any number of steps.
local function reachable(transitions)
  local from = {}
  local function walk(start, at)
    for _, following in ipairs(transitions[at] or {}) do
      if not from[start][following] then
        from[start][following] = true
        walk(start, following)
      end
    end
  end
  for name in pairs(transitions) do
    from[name] = {}
    walk(name, name)
  end
  return from
end

local function check_transitions(transitions, level)
  for from, list in pairs(transitions) do
    if type(from) ~= "string" then error("dedupe.state: transitions: states are strings", level + 1) end
    if not options.is_list(list) then
      error(("dedupe.state: transitions['%s'] must be a list of states, without gaps"):format(from), level + 1)
    end
    for _, to in ipairs(list) do
      if type(to) ~= "string" or to == "" then
        error(("dedupe.state: transitions['%s']: a state that follows must be a string with a name"):format(from),
          level + 1)
      end
    end
  end
end

--- Makes one.
---@param opts moonrabbit.dedupe.StateOptions
---@param level integer?
---@return moonrabbit.dedupe.State
function state.new(opts, level)
  level = (level or 1) + 1
  opts = options.check("dedupe.state", opts, store_options, level)
  for _, name in ipairs { "transitions", "current", "move" } do
    if opts[name] == nil then error(("dedupe.state: option '%s' is missing"):format(name), level) end
  end
  check_transitions(opts.transitions, level)
  local allowed = {}
  for from, list in pairs(opts.transitions) do
    allowed[from] = {}
    for _, to in ipairs(list) do allowed[from][to] = true end
  end
  return setmetatable({
    allowed = allowed, reach = reachable(opts.transitions), current = opts.current, move = opts.move,
    now = opts.now or os.time, own_clock = opts.now ~= nil,
    claims = {}, -- id -> { key, from, ends }: one step of a thing at a time
  }, Store)
end

--- Takes the clock of a runtime; called by the app.
---@package
function Store:attach(runtime)
  if not self.own_clock then self.now = runtime.now end
end

--- The key function of a consumer: from a message, the thing and the state that it is to come to.
---@param fn fun(message: moonrabbit.Message): string|nil, string|nil
---@return fun(message: moonrabbit.Message): string|nil
function Store.key(fn)
  return function(message)
    local id, to = fn(message)
    if id == nil or to == nil then return nil end
    return tostring(id) .. SEPARATOR .. tostring(to)
  end
end

local function away(what, err)
  if errors.is(err) then return nil, err end
  return nil, errors.new { kind = "closed", temporary = true, message = what .. ": " .. tostring(err) }
end

local function refused(message)
  return "refused", errors.new { kind = "protocol", temporary = false, message = message }
end

--- Claims a step.
---@param key string of Store.key
---@param lease number seconds
---@return "new"|"running"|"done"|"refused"|nil state, moonrabbit.Error?
function Store:begin(key, lease)
  local id, to = key:match "^(.*)\31([^\31]*)$"
  if not id then return refused "the key names no step: make it with the store's key()" end
  local claim = self.claims[id]
  if claim and claim.ends > self.now() then return "running" end
  local mine = { key = key, from = "", ends = self.now() + lease }
  self.claims[id] = mine -- before anything that may yield
  local ok, from, err = protect(self.current, id)
  local problem = not ok and from or err
  if not ok or (from == nil and err ~= nil) then
    self.claims[id] = nil
    return away("the state of '" .. id .. "'", problem)
  end
  from = from or ""
  local answer, why = self:judge(id, from, to)
  if answer == "new" then mine.from = from else self.claims[id] = nil end
  return answer, why
end

--- What a state says to a step.
---@package
function Store:judge(id, from, to)
  local allowed, later, behind = self.allowed[from] or {}, self.reach[from] or {}, self.reach[to] or {}
  if from == to then return "done" end
  if allowed[to] then return "new" end
  if behind[from] then return "done" end
  if later[to] then return "running" end
  return refused(("'%s' is '%s', and can never become '%s'"):format(id, from, to))
end

--- The step was handled: moves the state.
---@param key string
---@return true|nil, moonrabbit.Error?
function Store:commit(key)
  local id, to = key:match "^(.*)\31([^\31]*)$"
  local claim = self.claims[id]
  if not claim or claim.key ~= key then return true end
  local ok, moved, err = protect(self.move, id, claim.from, to)
  if not ok then return away("moving '" .. id .. "'", moved) end
  if moved == nil then return away("moving '" .. id .. "'", err or "the function 'move' returned nil") end
  if self.claims[id] == claim then self.claims[id] = nil end
  return true
end

--- The step was not handled.
---@param key string
---@return true
function Store:abort(key)
  local id = key:match "^(.*)\31"
  local claim = id and self.claims[id]
  if claim and claim.key == key then self.claims[id] = nil end
  return true
end

return state
