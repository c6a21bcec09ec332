--- The names in an app, and its exchanges and queues, checked.
-- @module moonrabbit.app.plan.entities

local fields = require "moonrabbit.app.plan.fields"
local mistake = require "moonrabbit.app.plan.mistake"
local options = require "moonrabbit.options"

local bad, check = mistake.bad, mistake.check

local entities = {}

local function sorted_names(what, map)
  local names = {}
  for name in pairs(map or {}) do
    if type(name) ~= "string" or name == "" or #name > 255 then
      bad("%s: a name must be a string of 1 to 255 bytes, not %s", what,
        type(name) == "string" and "one of " .. #name or "a " .. type(name))
    end
    names[#names + 1] = name
  end
  table.sort(names)
  return names
end

--- Whether a name is one of the app's own.
---@param what string
---@param kind "exchange"|"queue"
---@param name string
---@param map table
function entities.known(what, kind, name, map)
  if map[name] then return end
  local hint = options.nearest(name, map)
  bad("%s: %s is not among %ss%s; one that somebody else declares: ['%s'] = { passive = true }", what,
    ("the %s '%s'"):format(kind, name), kind, hint and " (did you mean '" .. hint .. "'?)" or "", name)
end

local function known_exchange(what, name, spec)
  if not name:find "^amq%." then entities.known(what, "exchange", name, spec.exchanges or {}) end
end

---@param spec moonrabbit.AppOptions
function entities.check_exchanges(spec)
  for _, name in ipairs(sorted_names("exchanges", spec.exchanges)) do
    local what, exchange = ("exchanges['%s']"):format(name), spec.exchanges[name]
    check(what, exchange, fields.exchange)
    if name:find "^amq%." and not exchange.passive then
      bad("%s: names that begin with amq. are the broker's", what)
    end
    if exchange.alternate then known_exchange(what .. ".alternate", exchange.alternate, spec) end
    for _, bind in ipairs(exchange.bind or {}) do known_exchange(what .. ".bind", bind[1], spec) end
  end
end

---@param spec moonrabbit.AppOptions
function entities.check_queues(spec)
  for _, name in ipairs(sorted_names("queues", spec.queues)) do
    local what, queue = ("queues['%s']"):format(name), spec.queues[name]
    check(what, queue, fields.queue)
    if (queue.type == "quorum" or queue.type == "stream")
      and (queue.exclusive or queue.auto_delete or queue.durable == false) then
      bad("%s: a %s queue is durable, and neither exclusive nor auto_delete", what, queue.type)
    end
    for _, bind in ipairs(queue.bind or {}) do known_exchange(what .. ".bind", bind[1], spec) end
  end
end

return entities
