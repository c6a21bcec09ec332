-- Lets a benchmark find this checkout, as "make" has built it, whatever shell or folder it is started from:
--   dofile((arg[0]:match "^(.*)/" or ".") .. "/paths.lua")
local top = (arg[0]:match "^(.*)/" or ".") .. "/.."
local build = (os.getenv "MOONRABBIT_BUILD" or top .. "/build") .. "/" .. _VERSION:match "%d%.%d"
package.path = ("%s/lua/?.lua;%s/lua/?/init.lua;%s/spec/?.lua;"):format(top, top, top) .. package.path
package.cpath = build .. "/?.so;" .. package.cpath
