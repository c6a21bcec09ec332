--- Queues, exchanges and bindings, as the management API shows them.
-- @module moonrabbit.management

local options = require "moonrabbit.options"

local argument, check = options.argument, options.check
local shortstr, text = options.shortstr, options.string

---@class moonrabbit.Management
local Management = {}

local list_of_strings = options.list_of(text, "a list of strings", 1)

---@class moonrabbit.ManagementQueuesOptions
---@field vhost string?      of one vhost; of all that the user may see by default
---@field columns string[]?  only these fields: a long list is much faster so
---@field name string?       only queues whose names hold this

--- GET /api/queues, page by page.
---@param opts moonrabbit.ManagementQueuesOptions?
---@return table[]|nil, moonrabbit.Error?
function Management:queues(opts)
  opts = check("Management:queues", opts, { vhost = shortstr, columns = list_of_strings, name = text })
  return self:_pages({ "queues", opts.vhost }, {
    columns = opts.columns and table.concat(opts.columns, ","), name = opts.name,
  })
end

--- GET /api/queues/VHOST/NAME
---@param vhost string
---@param name string
---@return table|nil, moonrabbit.Error?
function Management:queue(vhost, name)
  argument("Management:queue", "vhost", vhost, shortstr)
  argument("Management:queue", "name", name, shortstr)
  return self:_get({ "queues", vhost, name }, nil, "object")
end

-- Only the strings of what should be a list of them.
local function names(value)
  local list = {}
  for _, name in ipairs(type(value) == "table" and value or {}) do
    if type(name) == "string" then list[#list + 1] = name end
  end
  table.sort(list)
  return list
end

local function with(node, others)
  local list = names(others)
  if node then list[#list + 1] = node end
  table.sort(list)
  return list
end

--- Where a queue lives: the node of its leader (the master of a mirrored queue), all the nodes that have it
--- (`members`), and those of them that are up and in sync (`in_sync`). `leader` is nil while there is none.
---@param vhost string
---@param name string
---@return { type: string, leader: string?, members: string[], in_sync: string[], state: string? }|nil, moonrabbit.Error?
function Management:leader(vhost, name)
  argument("Management:leader", "vhost", vhost, shortstr)
  argument("Management:leader", "name", name, shortstr)
  local queue, err = self:_get({ "queues", vhost, name }, nil, "object")
  if not queue then return nil, err end
  local kind = type(queue.type) == "string" and queue.type or "classic"
  local found = { type = kind, state = queue.state }
  local leader = queue.leader or queue.node
  found.leader = type(leader) == "string" and leader or nil
  if type(queue.members) == "table" then
    found.members, found.in_sync = names(queue.members), names(queue.online)
  else
    found.members = with(found.leader, queue.slave_nodes)
    found.in_sync = with(found.leader, queue.synchronised_slave_nodes)
  end
  return found
end

--- DELETE /api/queues/VHOST/NAME
---@param vhost string
---@param name string
---@return true|nil, moonrabbit.Error?
function Management:delete_queue(vhost, name)
  argument("Management:delete_queue", "vhost", vhost, shortstr)
  argument("Management:delete_queue", "name", name, shortstr)
  return self:_change("DELETE", { "queues", vhost, name })
end

--- POST /api/queues/VHOST/NAME/actions: starts to copy a classic mirrored queue to its mirrors that are not in
--- sync. Meanwhile the queue serves nobody. https://www.rabbitmq.com/docs/3.13/ha#unsynchronised-mirrors
---@param vhost string
---@param name string
---@return true|nil, moonrabbit.Error?
function Management:sync_queue(vhost, name)
  argument("Management:sync_queue", "vhost", vhost, shortstr)
  argument("Management:sync_queue", "name", name, shortstr)
  return self:_change("POST", { "queues", vhost, name, "actions" }, { action = "sync" })
end

--- POST /api/rebalance/queues: spreads the leaders of mirrored and quorum queues over the nodes.
---@return true|nil, moonrabbit.Error?
function Management:rebalance()
  return self:_change("POST", { "rebalance", "queues" })
end

--- GET /api/exchanges, page by page.
---@param vhost string? of one vhost
---@return table[]|nil, moonrabbit.Error?
function Management:exchanges(vhost)
  if vhost ~= nil then argument("Management:exchanges", "vhost", vhost, shortstr) end
  return self:_pages { "exchanges", vhost }
end

--- GET /api/exchanges/VHOST/NAME
---@param vhost string
---@param name string
---@return table|nil, moonrabbit.Error?
function Management:exchange(vhost, name)
  argument("Management:exchange", "vhost", vhost, shortstr)
  argument("Management:exchange", "name", name, shortstr)
  return self:_get({ "exchanges", vhost, name }, nil, "object")
end

--- GET /api/bindings
---@param vhost string? of one vhost
---@return table[]|nil, moonrabbit.Error?
function Management:bindings(vhost)
  if vhost ~= nil then argument("Management:bindings", "vhost", vhost, shortstr) end
  return self:_get({ "bindings", vhost }, nil, "list")
end

--- GET /api/queues/VHOST/NAME/bindings
---@param vhost string
---@param name string
---@return table[]|nil, moonrabbit.Error?
function Management:queue_bindings(vhost, name)
  argument("Management:queue_bindings", "vhost", vhost, shortstr)
  argument("Management:queue_bindings", "name", name, shortstr)
  return self:_get({ "queues", vhost, name, "bindings" }, nil, "list")
end

return Management
