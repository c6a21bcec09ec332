-- A real PostgreSQL on a unix socket in a folder of its own. As root it runs as the user that Debian made for it, for
-- PostgreSQL refuses root.
local process = require "support.process"

local Server = {}
Server.__index = Server

local function shell(command)
  -- Without a sanitizer that a spec runs under: it is not PostgreSQL that is tested.
  local result = process.run({ "sh", "-c", command }, { raw = true, timeout = 120, unset = { "LD_PRELOAD" } })
  return result.code == 0, result.out .. result.err
end

local function find_bin()
  local _, out = shell "ls -d /usr/lib/postgresql/*/bin 2> /dev/null | sort -V | tail -n 1"
  local bin = out:match "%S+"
  return bin
end

-- The command as the user that may run a server.
function Server:as_user(command)
  if self.root then return ("runuser -u postgres -- sh -c %s"):format(process.quote(command)) end
  return command
end

function Server:run(command)
  local ok, out = shell(self:as_user(command))
  assert(ok, out)
  return out
end

function Server:start()
  self:run(("%s/pg_ctl -D %s/data -w -t 60 -l %s/log -o %s start"):format(self.bin, self.dir, self.dir,
    process.quote(("-c listen_addresses='' -c unix_socket_directories=%s -c fsync=off"):format(self.dir))))
end

function Server:kill()
  self:run(("%s/pg_ctl -D %s/data -m immediate -w stop"):format(self.bin, self.dir))
end

function Server:stop()
  shell(self:as_user(("%s/pg_ctl -D %s/data -m immediate -w stop"):format(self.bin, self.dir)))
  shell("rm -rf " .. process.quote(self.dir))
end

local M = {}

--- Why there can be none here; nil where there can.
function M.missing()
  if not find_bin() then return "PostgreSQL's server is not installed" end
end

--- Makes and starts one, with a database "spec" and the user "spec".
function M.start()
  local _, id = shell "id -u"
  local root = id:match "%d+" == "0"
  local _, dir = shell "mktemp -d /tmp/moonrabbit-postgres-XXXXXX"
  local self = setmetatable({ bin = find_bin(), dir = dir:match "%S+", root = root }, Server)
  if root then assert(shell("chown postgres " .. self.dir)) end
  self:run(("%s/initdb -D %s/data -U spec --auth=trust --no-sync"):format(self.bin, self.dir))
  self:start()
  self:run(("%s/createdb -h %s -U spec spec"):format(self.bin, self.dir))
  return self
end

return M
