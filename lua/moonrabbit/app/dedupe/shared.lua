--- A de-duplication store in a shared dictionary of nginx: one for all workers of one nginx.
--
--     lua_shared_dict webhooks 10m;
--
--     local seen = require "moonrabbit.app.dedupe.shared".new { dict = "webhooks", ttl = 86400 }
--     local state = seen:begin(id, 30)     -- "new", "running" or "done"
--
-- Every step is one atomic operation on the dictionary. What it holds survives a reload of nginx, and is gone
-- after a restart. It never drops a key before its time: a dictionary that is full refuses new ones, with an error of
-- kind `overflow`.
-- @module moonrabbit.app.dedupe.shared

local errors = require "moonrabbit.errors"
local options = require "moonrabbit.options"

local shared = {}

---@class moonrabbit.dedupe.Shared
local Store = {}
Store.__index = Store

local RUNNING, DONE = 1, 2
-- Seconds that a key is remembered.
local TTL = 3600
-- A key may expire between two looks at it.
local TRIES = 3

---@class moonrabbit.dedupe.SharedOptions
---@field dict string       the name of a `lua_shared_dict`
---@field ttl number?       seconds that a key is remembered after its commit; 3600 by default
---@field prefix string?    put before each key, where several stores share a dictionary; "" by default

local store_options = { dict = options.string, ttl = options.seconds, prefix = options.string }

--- Makes one. Throws outside nginx, and where there is no dictionary of that name.
---@param opts moonrabbit.dedupe.SharedOptions
---@param level integer? of the caller, for errors
---@return moonrabbit.dedupe.Shared
function shared.new(opts, level)
  level = (level or 1) + 1
  options.check("dedupe.shared", opts, store_options, level)
  if not opts or not opts.dict then error("dedupe.shared: option 'dict' is missing", level) end
  local nginx = rawget(_G, "ngx")
  if not nginx or not nginx.shared then
    error("dedupe.shared works inside nginx only: elsewhere there are other stores", level)
  end
  local dict = nginx.shared[opts.dict]
  if not dict then
    error(("dedupe.shared: there is no dictionary '%s': nginx needs `lua_shared_dict %s 10m;`"):format(opts.dict,
      opts.dict), level)
  end
  if opts.ttl == 0 then error("dedupe.shared: option 'ttl' must be more than 0", level) end
  return setmetatable({ dict = dict, name = opts.dict, ttl = opts.ttl or TTL, prefix = opts.prefix or "" }, Store)
end

local function refused(self, problem)
  if problem == "no memory" then
    return nil, errors.new { kind = "overflow", message = ("the dictionary '%s' is full"):format(self.name) }
  end
  return nil, errors.new { kind = "protocol", message = ("the dictionary '%s': %s"):format(self.name,
    tostring(problem)) }
end

--- Claims a key for `lease` seconds: "new", it is the caller's to handle; "running", somebody else has it;
--- "done", it was committed.
---@param key string
---@param lease number seconds, more than 0; a claim that is neither committed nor aborted ends then
---@return "new"|"running"|"done"|nil state, moonrabbit.Error?
function Store:begin(key, lease)
  options.argument("begin", "key", key, options.string)
  options.argument("begin", "lease", lease, options.seconds)
  if lease == 0 then error("begin: the lease must be more than 0 seconds", 2) end
  key = self.prefix .. key
  for _ = 1, TRIES do
    local ok, problem = self.dict:safe_add(key, RUNNING, lease)
    if ok then return "new" end
    if problem ~= "exists" then return refused(self, problem) end
    local state = self.dict:get(key)
    if state then return state == DONE and "done" or "running" end
  end
  return "running"
end

--- Remembers a key as done, for `ttl` seconds.
---@param key string
---@return true|nil, moonrabbit.Error?
function Store:commit(key)
  options.argument("commit", "key", key, options.string)
  local ok, problem = self.dict:safe_set(self.prefix .. key, DONE, self.ttl)
  if not ok then return refused(self, problem) end
  return true
end

--- Gives a claim back: the key is as if it had never come.
---@param key string
---@return true|nil, moonrabbit.Error?
function Store:abort(key)
  options.argument("abort", "key", key, options.string)
  self.dict:delete(self.prefix .. key)
  return true
end

return shared
