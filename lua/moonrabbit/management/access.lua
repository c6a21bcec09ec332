--- Users and what they may do.
-- https://www.rabbitmq.com/docs/access-control
-- @module moonrabbit.management

local options = require "moonrabbit.options"

local argument, check = options.argument, options.check
local shortstr, text = options.shortstr, options.string

---@class moonrabbit.Management
local Management = {}

--- GET /api/whoami: { name, tags }, the user of this client. `tags` is a list; what "management", "monitoring",
--- "policymaker" and "administrator" may ask of the API: https://www.rabbitmq.com/docs/management#permissions
---@return table|nil, moonrabbit.Error?
function Management:whoami()
  local user, err = self:_get({ "whoami" }, nil, "object")
  if not user then return nil, err end
  if type(user.tags) == "string" then -- before 3.9
    local tags = {}
    for tag in user.tags:gmatch "[^,%s]+" do tags[#tags + 1] = tag end
    user.tags = tags
  end
  return user
end

--- GET /api/users
---@return table[]|nil, moonrabbit.Error?
function Management:users()
  return self:_get({ "users" }, nil, "list")
end

---@class moonrabbit.UserOptions
---@field password string?  without one the user cannot log in by password
---@field tags string?      with commas between: "monitoring,policymaker"; "" by default

--- PUT /api/users/NAME: makes the user, or replaces its password and tags.
---@param name string
---@param opts moonrabbit.UserOptions?
---@return true|nil, moonrabbit.Error?
function Management:set_user(name, opts)
  argument("Management:set_user", "name", name, shortstr)
  opts = check("Management:set_user", opts, { password = text, tags = text })
  return self:_change("PUT", { "users", name }, {
    password = opts.password, password_hash = not opts.password and "" or nil, tags = opts.tags or "",
  })
end

--- DELETE /api/users/NAME
---@param name string
---@return true|nil, moonrabbit.Error?
function Management:delete_user(name)
  argument("Management:delete_user", "name", name, shortstr)
  return self:_change("DELETE", { "users", name })
end

--- GET /api/permissions/VHOST/USER: { configure, write, read }, regular expressions of names. An `http` error of
--- code 404: the user has none in that vhost, or there is no such user or vhost.
---@param vhost string
---@param user string
---@return table|nil, moonrabbit.Error?
function Management:permissions(vhost, user)
  argument("Management:permissions", "vhost", vhost, shortstr)
  argument("Management:permissions", "user", user, shortstr)
  return self:_get({ "permissions", vhost, user }, nil, "object")
end

---@class moonrabbit.PermissionOptions
---@field configure string?  a regular expression of names; ".*" by default, "" for none
---@field write string?      the same
---@field read string?       the same

--- PUT /api/permissions/VHOST/USER
---@param vhost string
---@param user string
---@param opts moonrabbit.PermissionOptions?
---@return true|nil, moonrabbit.Error?
function Management:set_permissions(vhost, user, opts)
  argument("Management:set_permissions", "vhost", vhost, shortstr)
  argument("Management:set_permissions", "user", user, shortstr)
  opts = check("Management:set_permissions", opts, { configure = text, write = text, read = text })
  return self:_change("PUT", { "permissions", vhost, user }, {
    configure = opts.configure or ".*", write = opts.write or ".*", read = opts.read or ".*",
  })
end

--- DELETE /api/permissions/VHOST/USER
---@param vhost string
---@param user string
---@return true|nil, moonrabbit.Error?
function Management:delete_permissions(vhost, user)
  argument("Management:delete_permissions", "vhost", vhost, shortstr)
  argument("Management:delete_permissions", "user", user, shortstr)
  return self:_change("DELETE", { "permissions", vhost, user })
end

return Management
