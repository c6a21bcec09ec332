--- Definitions: everything of a broker but its messages (users, vhosts, permissions, policies, parameters, queues,
-- exchanges, bindings), to be kept and restored; management/differences.lua compares them.
-- https://www.rabbitmq.com/docs/definitions
-- @module moonrabbit.management

local errors = require "moonrabbit.errors"
local json = require "moonrabbit.management.json"
local options = require "moonrabbit.options"

local argument = options.argument
local shortstr = options.shortstr

---@class moonrabbit.Management
local Management = {}

--- GET /api/definitions: as a table for `compare`, and as the JSON that the broker sent, to be kept and imported.
--- Of the whole broker they hold users with the hashes of their passwords, and URIs of upstreams and shovels: keep
--- them as secrets.
---@param vhost string?   only the queues, exchanges, bindings and policies of one vhost
---@return table|nil definitions, string|moonrabbit.Error text
function Management:definitions(vhost)
  if vhost ~= nil then argument("Management:definitions", "vhost", vhost, shortstr) end
  local text, err = self:request("GET", { "definitions", vhost })
  if not text then return nil, err end
  local value = json.decode(text)
  if not value or type(value.queues) ~= "table" then
    return nil, errors.new { kind = "protocol", endpoint = self.endpoint, temporary = false,
      message = "the management API answered what are no definitions" }
  end
  return value, text
end

--- POST /api/definitions: what they hold is declared, and what they don't hold stays. Users, policies and parameters
--- are changed to what they say; **a queue or exchange that is there with other properties stays as it is, and the
--- broker says nothing of it**: compare afterwards. What is wrong in itself is an `http` error of code 400, and the
--- broker may have taken what came before it.
---@param text string     JSON, as `definitions` gave it
---@param vhost string?   into one vhost: of definitions of one
---@return true|nil, moonrabbit.Error?
function Management:import_definitions(text, vhost)
  argument("Management:import_definitions", "text", text, options.string)
  if vhost ~= nil then argument("Management:import_definitions", "vhost", vhost, shortstr) end
  if not json.decode(text) then
    return nil, errors.new { kind = "protocol", message = "the definitions are no JSON: nothing was sent" }
  end
  local answer, err = self:request("POST", { "definitions", vhost }, { body = text })
  if not answer then return nil, err end
  return true
end

return Management
